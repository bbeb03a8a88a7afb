"""The cache folder of every command: one that cannot be had is named with the remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import environment, make_image_folder
from rsfast import create_model
from rsfast.models import official

UNKNOWN_USER = """
import pwd, sys
def unknown(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = unknown
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
COMMANDS = {
    "rsfast.train": "--arch tiny:network --resolutions 32 24 --loader pil --device cpu --epochs 1",
    "rsfast.data": "check {images}",
    "rsfast.evaluate": "{checkpoint} --loader pil --device cpu",
}


def commands_that_use_the_cache(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    images = make_image_folder(tmp_path / "images", train=2, val=2)
    official.save(create_model("resnet18", (48, 32), 10), tmp_path / "a.pt")
    for module, text in COMMANDS.items():
        given = text.format(images=images, checkpoint=tmp_path / "a.pt").split()
        if module == "rsfast.evaluate":
            given += ["--trained-resolutions", "48", "32"]
        yield module, given


@pytest.mark.slow
def test_a_user_without_a_home_is_told_to_name_a_cache(tmp_path: Path) -> None:
    gone = ("HOME", "XDG_CACHE_HOME", "RSFAST_CACHE")
    without = {name: value for name, value in environment().items() if name not in gone}
    for module, given in commands_that_use_the_cache(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", UNKNOWN_USER, module, *given],
            cwd=tmp_path,
            env=without,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert f"{module}: error: RSFAST_CACHE must name a folder" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    place = {**environment(), "RSFAST_CACHE": str(tmp_path / "file" / "cache")}
    for module, given in commands_that_use_the_cache(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", module, *given],
            cwd=tmp_path,
            env=place,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr
        assert f"cache folder {tmp_path / 'file' / 'cache'} must be writable" in done.stderr
        assert "; set RSFAST_CACHE to one that is" in done.stderr
        # A check still tells what it finds, and training on a folder of one's own does not need it.
        assert done.returncode == (0 if module == "rsfast.data" else 1)
