"""The extension `rsfast._C`, built and loaded where PyTorch has CUDA: its operators' schemas."""

from __future__ import annotations

import pytest
import torch

from rsfast.kernels import switchable_bn_act
from rsfast.kernels.common.backend import load_extension
from without_gpu.pretended import BACKWARDS

pytestmark = BACKWARDS  # then the extension is built, too
DIRECTIONS = ("fwd", "bwd")


@pytest.fixture(autouse=True)
def _loaded() -> None:
    load_extension()  # an error where it is not built: here it has to be


def schema(name: str) -> torch.FunctionSchema:
    namespace, operator = name.split("::")
    return getattr(getattr(torch.ops, namespace), operator).default._schema


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_operators_take_what_their_python_side_hands_over(direction: str) -> None:
    assert switchable_bn_act  # registers the Python side
    ours = schema(f"rsfast_C::switchable_bn_act_{direction}")
    python = schema(f"rsfast::switchable_bn_act_one_pass_{direction}")
    # In the same order, because they are handed over by position.
    assert [(a.name, str(a.type)) for a in ours.arguments] == [
        (a.name, str(a.type)) for a in python.arguments
    ]
    assert [a.is_write for a in ours.arguments] == [a.is_write for a in python.arguments]
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in python.returns]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_operators_are_for_gpus_only(direction: str) -> None:
    name = f"rsfast_C::switchable_bn_act_{direction}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(name, "CUDA")
    assert not has_kernel(name, "CPU")
