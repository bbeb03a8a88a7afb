"""Commands that are interrupted from the keyboard, or whose output cannot be written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsfast import create_model, evaluate
from rsfast.models import official
from rsfast.training import checkpoint

# Module, what its command calls for the work, and the command line after that.
COMMANDS: dict[str, tuple[str, str, list[str]]] = {
    "evaluate": ("rsfast.evaluate", "evaluate", ["{checkpoint}", "--loader", "pil"]),
    "analyze": ("rsfast.analyze", "evaluate", ["{checkpoint}", "--loader", "pil"]),
    "figures": ("rsfast.figures", "draw", ["{folder}"]),
    "export": ("rsfast.export.__main__", "_export", ["{checkpoint}", "--output", "{folder}/out"]),
    "export check": ("rsfast.export.check", "check", ["{folder}"]),
    "latency": ("rsfast.latency", "_configurations", ["{folder}"]),
    "experiments": ("rsfast.experiments.__main__", "_run", ["table2", "--output", "{folder}/out"]),
}


def prepared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]
) -> tuple[Callable[[list[str]], int], list[str]]:
    """The command and its arguments; its work is `work`."""
    module_name, function, arguments = COMMANDS[name]
    module = importlib.import_module(module_name)
    monkeypatch.setattr(module, function, work)
    if hasattr(module, "Manifest"):
        read = type("Read", (), {"resolutions": (48, 32)})
        monkeypatch.setattr(module.Manifest, "read", lambda _: read)
    if name == "experiments":
        monkeypatch.setattr(module, "_data_set", lambda _: {})
    official.save(create_model("resnet18", (224, 192, 160, 128, 96), 10), tmp_path / "a.pt")
    places = {"checkpoint": tmp_path / "a.pt", "folder": tmp_path / "folder"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "accuracy.csv").write_text("resolution,top1\n")
    return module.main, [text.format(**places) for text in arguments]


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_answered_with_a_sentence_and_130(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    main, arguments = prepared(name, tmp_path, monkeypatch, interrupted)
    assert main(arguments) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"rsfast.{name}: interrupted; ")


@pytest.mark.parametrize("name", ["evaluate", "analyze", "latency", "experiments"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("it has begun")

    main, arguments = prepared(name, tmp_path, monkeypatch, work)
    (tmp_path / "file").write_text("no folder")
    output = tmp_path / "file" / "out"
    assert main([*arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"rsfast.{name}: error: output folder {output} cannot be written: " in error


def test_evaluate_says_in_a_sentence_that_a_checkpoint_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(path: Path) -> bytes:
        raise OSError(f"checkpoint {path} cannot be read (Input/output error)")

    monkeypatch.setattr(checkpoint, "read_whole", unreadable)
    assert evaluate.main([str(tmp_path / "a.pt"), "--loader", "pil"]) == 1
    assert "rsfast.evaluate: error: checkpoint" in capsys.readouterr().err
