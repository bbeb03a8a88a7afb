"""Files of `torch.save`: plain values are read, nothing is run, what is refused is named."""

from __future__ import annotations

import argparse
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rsfast.files.unpickle import load_dict
from rsfast.training import checkpoint


class _Payload:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("executed",))


def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Payload()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"model": _Payload()}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"holds a posix.mkdir, which is neither .* run code"):
            checkpoint.load_model(name)
    assert not Path("executed").exists()


def test_numbers_of_numpy_settings_and_paths_in_a_file_are_read(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=np.float32(0.5), output=Path("/runs/a"))
    content = {
        "best": np.float64(71.25),
        "epoch": np.int64(7),
        "big": np.array(7.5, ">f8")[()],
        "flag": np.bool_(True),
        "args": args,
    }
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    strict = set(torch.serialization.get_safe_globals())
    for name in ("zip.pt", "old.pt"):
        found = load_dict(tmp_path / name)
        assert (found["best"], found["epoch"], found["big"], found["flag"]) == (71.25, 7, 7.5, True)
        assert vars(found["args"]) == {"lr": 0.5, "output": "/runs/a"}
        assert all(type(value).__module__ in ("builtins", "argparse") for value in found.values())
    assert set(torch.serialization.get_safe_globals()) == strict, "for other readers, too"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.array([{}], dtype=object), r"numpy\._core\.multiarray\._reconstruct"),
        (np.str_("a"), r"numpy\.dtype"),
        (Fraction(1, 2), r"fractions\.Fraction"),
    ],
    ids=["module", "array", "text", "fraction"],
)
def test_a_class_that_is_not_read_is_named(value: object, name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "other": value}, tmp_path / "a.pt")
    for read in (checkpoint.load_model, checkpoint.load_state):
        with pytest.raises(ValueError, match=rf"a.pt holds a {name}, which .* state_dict\(\)"):
            read(tmp_path / "a.pt")


def test_a_healthy_file_of_somebody_else_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is not of rsfast: it has no 'format'"):
        checkpoint.load_state(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is neither of rsfast nor of the authors'"):
        checkpoint.load_model(tmp_path / "other.pt")
