"""Pictures are drawn from CSV files alone, and committed ones can be drawn again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from rsfast import figures
from rsfast.files.tables import write_rows

RESULTS = Path(__file__).parent.parent / "bench" / "results"
COMMITTED = sorted({file.parent for file in RESULTS.rglob("*.csv")})


def test_there_are_committed_tables() -> None:
    assert COMMITTED


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda f: str(f.relative_to(RESULTS)))
def test_committed_pictures_are_drawn_again_from_their_tables(folder: Path, tmp_path: Path) -> None:
    for table in folder.glob("*.csv"):
        shutil.copy(table, tmp_path)
    drawn = {path.name for path in figures.draw(tmp_path)}
    assert drawn == {path.name for path in folder.glob("*.png")} - {"plots.png"}
    for name in drawn:
        with Image.open(folder / name) as old, Image.open(tmp_path / name) as new:
            if old.info["Software"] == new.info["Software"]:  # another version draws otherwise
                # Without alpha: the difference of two opaque pictures is transparent, hence empty.
                pictures = old.convert("RGB"), new.convert("RGB")
                assert ImageChops.difference(*pictures).getbbox() is None, name


def test_a_picture_follows_its_numbers(tmp_path: Path) -> None:
    def picture(share: float) -> bytes:
        rows = [{"epoch": n, "resolution": r, "share": share} for n in (1, 2) for r in (64, 48)]
        write_rows(tmp_path / "alpha.csv", rows)
        assert figures.main([str(tmp_path)]) == 0
        return (tmp_path / "alpha.png").read_bytes()

    assert picture(0.5) == picture(0.5)
    assert picture(0.5) != picture(0.4)


def test_folders_below_are_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        rows = [{"epoch": 1, "resolution": 64, "share": 1.0}]
        write_rows(tmp_path / name / "alpha.csv", rows)
    assert figures.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "a" / "alpha.png"),
        str(tmp_path / "b" / "c" / "alpha.png"),
    ]


def test_a_folder_with_nothing_to_draw_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "other.csv", [{"a": 1}])
    assert figures.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no known CSV files" in capsys.readouterr().err
    assert figures.main([str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
