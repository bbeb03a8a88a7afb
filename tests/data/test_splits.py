"""Which folders are the splits of a data set, and what lies in them that is no part of it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from archives import archived, samples_of, write_parquet, write_tar
from helpers import JPEG, cut, make_image_folder
from rsfast.data import index_folder, open_split, train_loader
from rsfast.data.__main__ import main
from rsfast.data.cache import has_record
from rsfast.data.convert import convert
from rsfast.data.index import check_command
from rsfast.data.splits import find_splits

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def flat(folder: Path) -> Path:
    """The data set with its validation images in one folder, and their list beside it."""
    for name in ("cat", "dog"):
        for file in sorted((folder / "val" / name).iterdir()):
            file.rename(folder / "val" / f"{name}{file.name}")
        (folder / "val" / name).rmdir()
    (folder / "list.txt").write_text("cat\ncat\ndog\ndog\n")
    return folder


def roots(data: Path) -> list[Path]:
    return [split.root for split in find_splits(data)]


@pytest.mark.parametrize("name", ["train", "validation", "vehicles"])
@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("bus", "train", "val")])
def test_a_split_with_a_class_called_train_is_checked_whole(
    name: str, classes: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_image_folder(tmp_path / "set", classes, train=2, val=2)
    shutil.rmtree(root / "val")
    split = (root / "train").rename(root / name)
    said = f"{name}: 6 images, 0 bad"
    assert main(["check", str(split)]) == 0
    assert said in capsys.readouterr().out
    if name != "vehicles":
        assert main(shlex.split(check_command(split))[3:]) == 0
        assert said in capsys.readouterr().out


def test_a_folder_called_train_may_be_that_of_the_data_set(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "train", train=1, val=1)
    assert roots(root) == [root / "train", root / "val"]
    (root / "notes").mkdir()
    assert roots(root) == [root / "train", root / "val"]
    shutil.rmtree(root / "val")
    (root / "notes").rmdir()
    assert roots(root) == [root / "train"]


def test_images_without_class_folders_are_a_split_beside_another_one(flat: Path) -> None:
    (flat / "test").mkdir()
    (flat / "test" / "0.jpg").write_bytes(JPEG)
    assert [split.is_flat for split in find_splits(flat)] == [False, True]
    assert roots(flat / "val") == [flat / "val"]
    shutil.rmtree(flat / "train")
    assert roots(flat) == [flat]


def test_shards_are_a_split_beside_other_folders(folder: Path, tmp_path: Path) -> None:
    data = archived(
        make_image_folder(tmp_path / "f", ("cat", "dog", "eel")), tmp_path / "s", "shards"
    )
    (data / "notes").mkdir()
    assert roots(data) == [data / "train", data / "val"]
    assert roots(data / "val") == [data / "val"]


def test_a_folder_of_classes_called_train_and_val_is_converted_and_back(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "set", ("train", "val"), train=2, val=0) / "train"
    shards, back = tmp_path / "shards", tmp_path / "back"
    convert(root, shards)
    (done,) = convert(shards / "train", back)
    assert (done.images, done.same_order) == (4, True)
    assert index_folder(done.folder).class_names == ("train", "val")


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", ".cache"])
def test_archives_may_lie_beside_what_systems_leave_behind(name: str, folder: Path) -> None:
    root = folder.parent / "shards"
    for split in ("train", "val"):
        write_tar(root / split / "0.tar", samples_of(folder / split))
        (root / split / name).mkdir()
        (root / split / "._0.tar").write_bytes(b"of another system")
    assert len(open_split(root, "train")) == 6
    assert [bool(split.files) for split in find_splits(root)] == [True, True]
    assert main(["check", str(root)]) == 0


def test_hidden_images_and_classes_are_no_part_of_a_list(flat: Path) -> None:
    (flat / "val" / "._cat0000.jpg").write_bytes(b"of another system")
    (flat / "train" / ".ipynb_checkpoints").mkdir()
    (flat / "train" / "lost+found").mkdir()
    index = open_split(flat, "val", labels=flat / "list.txt")
    assert index.class_names == ("cat", "dog")
    assert (len(index), index.labels.tolist()) == (4, [0, 0, 1, 1])
    assert main(["check", str(flat)]) == 0


def test_a_folder_of_hidden_things_only_is_none_of_class_folders(flat: Path) -> None:
    (flat / "val" / "@eaDir").mkdir()
    assert [split.is_flat for split in find_splits(flat)] == [False, True]


def test_a_conversion_may_begin_beside_what_systems_leave_behind(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "train" / "lost+found").mkdir(parents=True)
    assert [done.images for done in convert(folder, tmp_path / "out")] == [6, 4]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_an_image_is_left_out_of_either_split(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "val").rename(folder / "validation")
    split = "train" if name == "train" else "val"
    count = len(open_split(folder, split))
    monkeypatch.chdir(folder.parent)
    for number, file in enumerate((f"{name}/cat/0000.jpg", f"folder/{name}/dog/0001.jpg"), 1):
        assert main(["exclude", "folder", file]) == 0
        assert capsys.readouterr().out == f"{name}: files left out by hand: {number}\n"
        assert len(open_split(folder, split)) == count - number
    assert main(["exclude", "folder", "cat/0001.jpg"]) == 2  # of which split?
    assert main(["exclude", f"folder/{name}", "cat/0000.jpg", "--undo"]) == 0
    assert len(open_split(folder, split)) == count - 1


def test_no_file_is_left_out_where_one_of_them_is_no_image(flat: Path) -> None:
    files = [str(flat / "val" / "cat0000.jpg"), "train/cat/0000.jpg"]
    assert main(["exclude", str(flat), *files, "val/none.jpg"]) == 2
    assert len(open_split(flat, "train")) == 6
    assert main(["exclude", str(flat), *files]) == 0
    assert len(open_split(flat, "train")) == 5
    assert len(open_split(flat, "val", labels=flat / "list.txt")) == 3


def test_a_check_and_an_exclusion_count_however_the_archives_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut(folder / "train" / "dog" / "0001.jpg")
    root = tmp_path / "shards"
    members = samples_of(folder / "train")
    for number in range(2):
        write_tar(root / "train" / f"t-{number:03d}.tar", members[6 * number : 6 * number + 6])
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root / "train")
    assert main(["check", "t-*.tar"]) == 1
    assert main(["exclude", "t-*.tar", "t-000.tar/cat/0002.jpg"]) == 0
    for data in (root, "t-{000..001}.tar", f"{tmp_path}/link/train/*.tar"):
        assert len(open_split(data, "train")) == 4
        train_loader(data, (32,), 2, backend="pil")
    assert "was never checked" not in caplog.text
    one = open_split("t-000.tar", "train")
    assert (len(one), has_record(one.key)) == (3, False)  # other archives


def test_who_tolerates_cut_off_images_is_told_to_make_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    images = [image for name, image in samples_of(folder / "train") if name.endswith("jpg")]
    file = write_parquet(tmp_path / "p" / "train" / "0.parquet", images, [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="with a folder of images, got archives") as caught:
        open_split(tmp_path / "p", "train", tolerate_truncated=True)
    command = re.search("python -m rsfast.data (convert --to folder)", str(caught.value))[1]
    assert main([*command.split(), str(tmp_path / "p"), str(tmp_path / "out")]) == 0
    index = open_split(tmp_path / "out", "train")
    assert len(index) == 6
    assert not index.files
    assert file.exists()


@pytest.mark.parametrize("form", ["shards", "parquet"])
def test_what_is_indexed_and_written_is_counted_in_lines_where_there_is_no_terminal(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set" / "train"
    for number in range(20):
        if form == "shards":
            write_tar(root / f"{number}.tar", samples_of(folder / "train")[:2])
        else:
            pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
            write_parquet(root / f"{number}.parquet", [JPEG], [0])
    for to in ("shards", "folder"):
        convert(root.parent, tmp_path / f"to_{to}", to=to)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "indexing train: 100%, 20/20" in said
    assert said.count("writing train: 100%, 20/20") == 2


def test_a_pattern_that_the_shell_has_expanded_is_to_be_quoted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["check", "a.tar", "b.tar"], ["convert", "a.tar", "b.tar", "c.tar"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {argv[-1]}; quote a pattern" in capsys.readouterr().err
