"""Class folders that are numbered, whose labels are other numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import make_image_folder
from rsfast import evaluate, train
from rsfast.data.labels import warn_of_numbers
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import create_model
from rsfast.training import checkpoint

TWELVE = tuple(sorted(map(str, range(12))))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (TWELVE, "label 2 is folder 10, not 2; .* such as 02$"),
        (("class1", "class10", "class2"), "label 1 is folder class10, not class2; .* class02$"),
        (("1", "3", "20"), None),
        (tuple(str(n) for n in range(12)), None),  # those of the synthetic loader
        (("0", "1", "9"), None),
        (("00", "01", "10"), None),
        (("n01440764", "n01443537"), None),
        (("10", "2", "cat"), None),
        (("cat", "dog"), None),
        ((), None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_numbers_are_told_where_text_has_another_order(
    names: tuple[str, ...], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        warn_of_numbers(tmp_path / split, names)  # of archives
    warn_of_numbers(None, names)
    warn_of_numbers("/data/{0..9}.tar", names)
    assert not caplog.messages
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    warn_of_numbers(str(tmp_path), names)
    assert len(caplog.messages) == (said is not None)
    if said:
        assert caplog.messages[0].startswith(
            f"class folders in {tmp_path} are numbered, but labels"
        )
        assert re.search(said, caplog.messages[0])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "set", classes=TWELVE, train=1, val=1, size=(40, 40))


PIL = ("--loader", "pil", "--workers", "0")


def test_an_evaluation_warns_where_the_checkpoint_has_no_names(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for names, warned in ((None, True), (TWELVE, False)):
        model = create_model("tiny:network", (32, 16), 12)
        model.class_names = names
        loss = MultiResolutionDistillation(2)
        payload = {**checkpoint.model_payload(model), "loss": loss.state_dict()}
        checkpoint.save(payload, tmp_path / "model.pt")
        caplog.clear()
        arguments = [str(tmp_path / "model.pt"), "--arch", "tiny:network", "--data", str(data)]
        assert evaluate.main([*arguments, *PIL]) == 0
        assert ("label 2 is folder 10, not 2" in caplog.text) is warned


def test_a_training_warns(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = ("--resolutions", "32", "16", "--batch-size", "4", "--epochs", "1")
    output = ("--output", str(tmp_path / "run"))
    arguments = ["--arch", "tiny:network", "--data", str(data), *sizes, *output, *PIL]
    assert train.main(arguments) == 0
    assert "label 2 is folder 10, not 2" in caplog.text
