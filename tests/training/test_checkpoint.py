"""Checkpoint files: round trip, damage, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from faults import WithWrite
from rsfast import create_model
from rsfast.files import seal
from rsfast.training import checkpoint
from run_helpers import network_payload


def test_a_network_comes_back_whole(tmp_path: Path) -> None:
    content = network_payload()
    checkpoint.save(content, tmp_path / "a.pt")
    model, alpha = checkpoint.load_model(tmp_path / "a.pt")
    assert (model.arch, model.resolutions, model.num_classes) == ("resnet18", (48, 32), 3)
    assert (model.input_mean, model.input_std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert (model.val_crop, model.exif) == ("none", "honour")
    assert (model.levels, model.picked_from) == ("nearest", 64)
    assert model.class_names == ("a", "b", "c")
    assert torch.equal(alpha, torch.ones(2))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["model"][key])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    content = network_payload()
    content["ema"] = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    checkpoint.save(content, tmp_path / "a.pt")
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert not model.network.fc.weight.any()


class _Disk:
    """Everything that a save asks of the disk, which is full from the numbered request on."""

    def __init__(self, patch: pytest.MonkeyPatch, full_from: int) -> None:
        self.requests = 0
        self._full_from = full_from
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (shutil, "copyfile")):
            patch.setattr(module, name, self._counted(getattr(module, name)))

        def opened(path: Any, mode: str = "r") -> Any:
            file = open(path, mode, buffering=0)  # noqa: SIM115 (the caller closes it)
            return WithWrite(file, self._counted(file.write)) if "w" in mode else file

        patch.setattr(seal, "open", opened, raising=False)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.requests += 1
            if self.requests > self._full_from:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return run


@pytest.mark.parametrize("chunk", [2**24, 200], ids=["one-write", "many-writes"])
def test_a_disk_that_is_full_at_any_write_leaves_last_pt_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(seal, "_CHUNK", chunk)
    contents = [{"epoch": n, "w": torch.full((300,), float(n))} for n in range(4)]

    def save_under(full_from: int) -> int:
        """Saves the fourth checkpoint; the requests that it made."""
        for content in contents[:3]:
            checkpoint.save_with_predecessors(content, tmp_path, keep=3)
        with monkeypatch.context() as patch:
            disk = _Disk(patch, full_from)
            checkpoint.save_with_predecessors(contents[3], tmp_path, keep=3)
        return disk.requests

    needed = save_under(full_from=10**9)
    assert needed >= (8 if chunk > 2**20 else 15)
    for number in range(needed):
        with pytest.raises(OSError, match="No space left"):
            save_under(full_from=number)
        # Only the last request comes after last.pt is the new one.
        epoch = 3 if number == needed - 1 else 2
        assert checkpoint.load_state(tmp_path / "last.pt")["epoch"] == epoch, number
        assert checkpoint.newest(tmp_path) == tmp_path / "last.pt"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_as_many_as_asked_for_are_kept_newest_first(tmp_path: Path) -> None:
    for keep, names in ((3, "last last-1 last-2"), (1, "last"), (2, "last last-1")):
        for epoch in range(5):
            checkpoint.save_with_predecessors({"epoch": epoch}, tmp_path, keep)
        found = sorted(path.stem for path in tmp_path.glob("*.pt"))
        assert found == names.split()
        epochs = [checkpoint.load_state(tmp_path / f"{name}.pt")["epoch"] for name in found]
        assert epochs == list(range(4, 4 - keep, -1))


def test_every_flipped_bit_and_every_lost_end_is_found(tmp_path: Path) -> None:
    generator = random.Random(0)
    checkpoint.save_with_predecessors({"epoch": 1, "w": torch.rand(5000)}, tmp_path, keep=2)
    checkpoint.save_with_predecessors({"epoch": 2, "w": torch.rand(5000)}, tmp_path, keep=2)
    last, older = tmp_path / "last.pt", tmp_path / "last-1.pt"
    good, good_older = last.read_bytes(), older.read_bytes()
    # Both ends are where the structure of the file is.
    places = [*range(50), *range(len(good) - 100, len(good))]
    places += [generator.randrange(len(good)) for _ in range(100)]
    for number, place in enumerate(places):
        damaged = bytearray(good)
        if number % 3:
            damaged[place] ^= 1 << generator.randrange(8)
        else:
            del damaged[place:]
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last.pt is damaged"):
            checkpoint.load_state(last)
        assert checkpoint.newest(tmp_path) == older, place
        assert older.read_bytes() == good_older
        assert (tmp_path / "last.pt.damaged").read_bytes() == damaged
    assert len(places) == 250


def test_with_no_whole_checkpoint_left_all_are_named(tmp_path: Path) -> None:
    for epoch in range(2):
        checkpoint.save_with_predecessors({"epoch": epoch}, tmp_path, keep=2)
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole .*: .*last.pt .*last-1.pt"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_file_system_without_links_keeps_predecessors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(2):
        checkpoint.save_with_predecessors({"epoch": epoch}, tmp_path, keep=2)
    assert checkpoint.load_state(tmp_path / "last-1.pt")["epoch"] == 0


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format": 99, **network_payload()}, buffer)
    archive = bytearray(buffer.getbuffer())
    seal.write_whole(tmp_path / "a.pt", [archive, seal.seal_zip(archive)])
    with pytest.raises(ValueError, match="must be of format 3, got 99"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_other_programs_read_a_sealed_file(tmp_path: Path) -> None:
    checkpoint.save(network_payload(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"rsfast-sha256:")
    for mmap in (False, True):
        content = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert content["settings"]["arch"] == "resnet18"


def test_weights_as_safetensors_hold_all_it_takes_to_use_them(tmp_path: Path) -> None:
    checkpoint.save(network_payload(), tmp_path / "a.pt")
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    alpha = torch.tensor([0.5, 2.0])
    checkpoint.save_weights(model, alpha, tmp_path / "a.safetensors")
    found, found_alpha = checkpoint.load_model(tmp_path / "a.safetensors")
    assert torch.equal(found_alpha, alpha)
    assert found.settings() == model.settings()
    for name in (
        "input_mean",
        "input_std",
        "val_crop",
        "exif",
        "levels",
        "picked_from",
        "class_names",
    ):
        assert getattr(found, name) == getattr(model, name)
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rsfast"])["resolutions"] == [48, 32]
    assert not found.training


@pytest.mark.parametrize(
    ("name", "meant"), [("exif", "ignore"), ("levels", "resize"), ("picked_from", None)]
)
def test_a_checkpoint_that_says_nothing_of_a_younger_setting_was_trained_without_it(
    tmp_path: Path, name: str, meant: str
) -> None:
    content = network_payload()
    del content[name]
    checkpoint.save(content, tmp_path / "a.pt")
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert getattr(model, name) == meant


@pytest.mark.parametrize("damage", ["header", "end", "weight", "settings", "other"])
def test_damaged_safetensors_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    model = create_model("resnet18", (48, 32), 3)
    checkpoint.save_weights(model, torch.ones(2), path)
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[3] ^= 255
    elif damage == "end":
        del data[-10:]
    elif damage == "weight":
        data[len(data) // 2] ^= 1
    elif damage == "settings":
        data[data.index(b"resnet18")] ^= 1
    else:
        data = bytearray(to_safetensors({"w": torch.zeros(1)}))
    path.write_bytes(data)
    fault = f"a.safetensors is {'not of rsfast' if damage == 'other' else 'damaged'}"
    with pytest.raises(ValueError, match=fault):
        checkpoint.load_model(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    checkpoint.save(network_payload(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"checkpoint .*a.pt is damaged"):
        checkpoint.load_model(tmp_path / "a.pt")


class _Unreadable:
    """Makes the first reads of files fail, as a server that is away does."""

    def __init__(self, patch: pytest.MonkeyPatch, times: int, number: int) -> None:
        self.times, self._number = times, number
        patch.setattr(seal, "_PAUSES_S", (0.0, 0.0, 0.0))
        patch.setattr(seal, "open", self._open, raising=False)
        read_bytes = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda path: self._fail() or read_bytes(path))

    def _open(self, path: Any, mode: str = "r") -> Any:
        if "r" in mode:
            self._fail()
        return open(path, mode)

    def _fail(self) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in range(2):
        checkpoint.save_with_predecessors({"epoch": epoch}, tmp_path, keep=2)
    last = tmp_path / "last.pt"
    readers = (checkpoint.newest, tmp_path), (checkpoint.load_state, last)
    for read, path in readers:
        with monkeypatch.context() as patch:
            _Unreadable(patch, 3, number)
            assert read(path) in (last, checkpoint.load_state(last))
    for read, path in (*readers, (checkpoint.load_model, last)):
        with monkeypatch.context() as patch:
            _Unreadable(patch, 4, number)
            with pytest.raises(OSError, match=r"last.pt cannot be read .*: it is left as it is"):
                read(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-1.pt", "last.pt"]


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.pt does not exist"):
        checkpoint.load_model(tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict, got list"):
        checkpoint.load_model(tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither of rsfast nor of the authors' code"):
        checkpoint.load_model(tmp_path / "other.pt")
    content = network_payload()
    content["settings"]["arch"] = "resnet34"
    checkpoint.save(content, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="does not fit the resnet34 it says it is"):
        checkpoint.load_model(tmp_path / "wrong.pt")
