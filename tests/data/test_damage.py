"""What the check says of archives that are damaged, and of shards with another hash."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from archives import archived
from helpers import make_image_folder
from rsfast.data import manifest, open_split
from rsfast.data.__main__ import main
from rsfast.data.convert import convert

pytestmark = pytest.mark.usefixtures("cache")


def test_the_check_compares_the_hashes_of_shards_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = tmp_path / "shards"
    convert(folder, shards, images_per_shard=2)
    assert main(["check", str(shards)]) == 0
    file = shards / "train" / "train-00001.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        at = tar.getmember("dog/0000.jpg").offset_data - 100  # unused bytes of a header
    content[at : at + 2] = b"\1\1"
    content = _with_checksum(content, at // 512 * 512)
    file.write_bytes(content)
    assert len(open_split(shards, "train")) == 6, "training compares sizes"
    for reads in (3, 0):
        hashed = []
        sha256 = manifest._sha256
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "_sha256", lambda f, s=sha256, h=hashed: h.append(f) or s(f))
            assert main(["check", str(shards)]) == 1
        assert len(hashed) == reads
        said = capsys.readouterr().out
        assert "bad       train/train-00001.tar  its SHA-256 is not that in " in said
        assert "bad shards are used all the same" in said
        assert "bad images" not in said


def _with_checksum(content: bytearray, at: int) -> bytearray:
    """A tar header at this place whose sum is right again."""
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return content


@pytest.mark.parametrize("form", ["shards", "parquet", "converted"])
def test_the_check_names_every_damaged_archive_of_all_splits(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_image_folder(tmp_path / "images", ("cat", "dog", "eel"), train=3, val=2)
    data = tmp_path / "archives"
    if form == "converted":
        convert(folder, data, images_per_shard=5)
    else:
        if form == "parquet":
            pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
        archived(folder, data, form)
    files = sorted(file for file in data.glob("*/*") if file.suffix in (".tar", ".parquet"))
    assert len(files) == 4
    for file in files[:3]:
        file.write_bytes(file.read_bytes()[:700])
    assert main(["check", str(data)]) == 2
    captured = capsys.readouterr()
    for file in files[:3]:
        assert captured.err.count(str(file)) == 1
    assert str(files[3]) not in captured.err
    assert "Traceback" not in captured.err
    with pytest.raises(ValueError, match=re.escape(str(files[0]))):
        open_split(data, "train")
