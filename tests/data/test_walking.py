"""Links that lead in circles, and what systems leave in folders: neither adds images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers import JPEG, make_image_folder
from rsfast.data import index_folder
from rsfast.data.__main__ import main
from rsfast.data.check import Report, check_split
from rsfast.data.splits import find_splits

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cats and three dogs."""
    return make_image_folder(tmp_path / "set", train=3, val=1) / "train"


def told(report: Report) -> dict[str, tuple[str, str]]:
    return {path: (kind, reason) for kind, path, reason in report.findings}


@pytest.mark.parametrize(
    ("link", "target", "reason"),
    [
        ("cat/self", ".", "link to cat, which is visited once"),
        ("cat/up", "..", "link to a folder in which it lies, which is visited once"),
        ("cat/far_up", "../../..", "link to a folder in which it lies, which is visited once"),
        ("self", ".", "link to a folder in which it lies"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_to_a_folder_in_which_it_lies_adds_nothing_and_is_reported(
    link: str,
    target: str,
    reason: str,
    absolute: bool,
    root: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = index_folder(root)
    place = root / link
    place.symlink_to((place.parent / target).resolve() if absolute else target)
    after = index_folder(root)
    assert (after.paths, after.class_names) == (before.paths, before.class_names)
    assert "passed over, being hidden or visited already (to list them: " in caplog.text
    assert caplog.messages[-1].endswith(f": {link}")
    report = check_split(root)
    assert told(report) == {link: ("unused", reason)}
    assert report.is_good


def test_links_to_one_folder_are_visited_once_and_its_own_name_is_preferred(
    root: Path, tmp_path: Path
) -> None:
    for folder in (root / "cat" / "more", tmp_path / "elsewhere"):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(JPEG)
    (root / "cat" / "again").symlink_to("more")
    for name in ("first", "second"):
        (root / "dog" / name).symlink_to(tmp_path / "elsewhere")
    index = index_folder(root)
    assert [path for path in index.paths if path.endswith("a.jpg")] == [
        "cat/more/a.jpg",
        "dog/first/a.jpg",
    ]
    assert told(check_split(root)) == {
        "cat/again": ("unused", "link to cat/more, which is visited once"),
        "dog/second": ("unused", "link to dog/first, which is visited once"),
    }


def test_a_folder_of_two_classes_counts_for_both_and_is_reported(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "emu").symlink_to("dog")
    (root / "cat" / "dogs").symlink_to("../dog")
    index = index_folder(root)
    assert index.labels.tolist() == [0] * 6 + [1] * 3 + [2] * 3
    assert "2 files or folders in" in caplog.text
    reason = "folder of two classes: its images are those of cat/dogs, too"
    findings = told(check_split(root))
    assert findings == {"dog": ("odd", reason), "emu": ("odd", reason)}


def test_a_link_that_leads_to_itself_is_no_folder(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    (root / "cat" / "loop").symlink_to("loop")
    assert index_folder(root).class_names == ("cat", "dog")
    assert len(index_folder(root)) == 6
    assert check_split(root).is_good


FOLDERS = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".git", "$RECYCLE.BIN"]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("place", ["", "cat", "cat/deep"])
def test_hidden_folders_and_those_of_systems_are_no_part_of_the_data_set(
    name: str, place: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "0.jpg").write_bytes(JPEG)
    before = index_folder(root)
    assert not caplog.messages
    shutil.copytree(root / "dog", root / place / name)
    after = index_folder(root)
    assert (after.paths, after.class_names) == (before.paths, before.class_names)
    assert caplog.messages[-1].endswith(f": {Path(place) / name}")
    report = check_split(root)
    reason = "hidden, or left by a system: no part of the data set"
    assert told(report) == {str(Path(place) / name): ("unused", reason)}
    assert (report.images, report.is_good) == (7, True)


def test_hidden_files_are_reported_where_they_are_images_by_name(root: Path) -> None:
    hidden = ("._0000.jpg", ".jpg", ".0000.PNG", ".DS_Store", "Thumbs.db", "desktop.ini")
    for name in hidden:
        (root / "cat" / name).write_bytes(JPEG)
    assert len(index_folder(root)) == 6
    assert told(check_split(root)).keys() == {f"cat/{name}" for name in hidden[:3]}


def test_a_split_of_hidden_folders_only_is_none(root: Path) -> None:
    for split in ("train", "val"):
        for folder in (root.parent / split).iterdir():
            folder.rename(folder.with_name(f".{folder.name}"))
    assert [split.root for split in find_splits(root.parent)] == [root.parent]
    with pytest.raises(ValueError, match="must have one sub-folder per class, found none"):
        index_folder(root)


def test_a_data_set_may_lie_in_a_hidden_folder(root: Path, tmp_path: Path) -> None:
    hidden = root.rename(tmp_path / ".hidden")
    assert len(index_folder(hidden)) == 6
    assert main(["check", str(hidden)]) == 0
