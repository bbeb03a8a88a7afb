"""What belongs to each task."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from rsfast.data.builtin import builtin_root
from rsfast.files.task_names import TASKS
from rsfast.tasks import _PARTS, task_of


def test_every_task_has_its_parts() -> None:
    assert tuple(_PARTS) == TASKS
    assert task_of(SimpleNamespace(task="segmentation")).figures["iou"] == "mean IoU"


def test_every_task_has_a_built_in_set() -> None:
    with pytest.raises(ValueError, match=re.escape(f"task must be one of {TASKS}, got")):
        builtin_root(task="detection")
