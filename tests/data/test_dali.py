"""The graph of the DALI loader, also the one that only a GPU can run, and its errors and ends."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import environment, make_image_folder
from rsfast.data import Loader, train_loader, val_loader

dali = pytest.importorskip("rsfast.data.dali", reason="the dali loader needs NVIDIA DALI")

RESOLUTIONS = (48, 32, 24)
Calls = dict[str, list[dict[str, Any]]]


def loader_of(root: Path, split: str, batch_size: int = 4, **arguments: Any) -> Loader:
    make = train_loader if split == "train" else val_loader
    arguments = {"workers": 2, **arguments}
    return make(root, RESOLUTIONS, batch_size, backend="dali", **arguments)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments by name of every operator that a graph is made of."""
    found: Calls = defaultdict(list)

    def record(name: str, operator: Callable) -> Callable:
        def call(*inputs: Any, **arguments: Any) -> Any:
            found[name].append(arguments)
            return operator(*inputs, **arguments)

        return call

    operators = {
        "image": dali.fn.decoders,
        "image_slice": dali.fn.decoders,
        "slice": dali.fn,
        "resize": dali.fn,
        "read": dali.fn.io.file,
    }
    for name, module in operators.items():
        monkeypatch.setattr(module, name, record(name, getattr(module, name)))
    return found


def outputs_of(loader: Loader) -> list[str]:
    """Makes the graph, for a device that need not exist; where each of its levels lies."""
    pipeline = loader._decoder._define(dali.Feed(loader.plan))
    *levels, shapes = pipeline._graph_out
    assert shapes.device == "cpu"
    return [level.device for level in levels]


GRAPHS = [("train", {"crop": "single"}), ("train", {"crop": "multi"}), ("val", {})]


@pytest.mark.parametrize(("split", "modes"), GRAPHS, ids=["single", "multi", "val"])
def test_a_gpu_decodes_whole_images_and_cuts_afterwards(
    split: str, modes: dict[str, str], image_root: Path, calls: Calls
) -> None:
    loader = loader_of(image_root, split, device="cuda:0", **modes)
    assert outputs_of(loader) == ["gpu"] * len(RESOLUTIONS)
    assert not calls["image_slice"]
    (decode,) = calls["image"]
    assert decode["device"] == "mixed"
    cuts = 1 if modes.get("crop") == "single" else len(RESOLUTIONS)
    assert len(calls["slice"]) == cuts
    assert len(calls["resize"]) == len(RESOLUTIONS)


@pytest.mark.parametrize(("device", "gpu"), [("cpu", None), ("cuda:2", 2), ("cuda", 1)])
def test_the_graph_is_for_the_gpu_that_is_asked_for_or_the_current_one(
    device: str, gpu: int | None, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    loader = loader_of(image_root, "train", device=device)
    assert loader._decoder._define(dali.Feed(loader.plan)).device_id == gpu


def test_a_cpu_decodes_the_region_of_a_single_crop(image_root: Path, calls: Calls) -> None:
    assert outputs_of(loader_of(image_root, "train")) == ["cpu"] * len(RESOLUTIONS)
    (decode,) = calls["image_slice"]
    assert decode["device"] == "cpu"
    assert not calls["image"]
    assert not calls["slice"]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(("split", "modes"), GRAPHS, ids=["single", "multi", "val"])
def test_every_decoder_interpolates_colours_and_leaves_the_orientation(
    split: str, modes: dict[str, str], device: str, image_root: Path, calls: Calls
) -> None:
    outputs_of(loader_of(image_root, split, device=device, **modes))
    (decode,) = calls["image"] + calls["image_slice"]
    assert decode["jpeg_fancy_upsampling"] is True
    assert decode["adjust_orientation"] is False


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_means_of_decoding_reach_the_graph(split: str, image_root: Path, calls: Calls) -> None:
    given = {"hw_decoder_load": 0.25, "dont_use_mmap": True}
    outputs_of(loader_of(image_root, split, 5, device="cuda:0", **given))
    outputs_of(loader_of(image_root, split, 7, device="cuda:0"))
    assert [call["hw_decoder_load"] for call in calls["image"]] == [0.25, 0.9]
    assert [call["dont_use_mmap"] for call in calls["read"]] == [True, False]
    sizes = [call["minibatch_size"] for call in calls["resize"]]
    assert sizes == [5] * len(RESOLUTIONS) + [7] * len(RESOLUTIONS)


def rows_of(loader: Loader) -> torch.Tensor:
    return torch.cat([batch.images.rows for batch in loader])


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_means_of_decoding_change_no_picture(split: str, image_root: Path) -> None:
    plain = rows_of(loader_of(image_root, split))
    other = loader_of(image_root, split, workers=1, hw_decoder_load=0.0, dont_use_mmap=True)
    assert torch.equal(plain, rows_of(other))


def test_cutting_whole_images_gives_the_pictures_of_regions(image_root: Path, calls: Calls) -> None:
    """What a GPU does, on a CPU."""
    regions, cut = (loader_of(image_root, "train") for _ in range(2))
    cut._decoder._whole_images = True
    assert torch.equal(rows_of(cut), rows_of(regions))
    assert len(calls["image"]) == len(calls["image_slice"]) == 1


def test_a_gpu_hands_over_the_pictures_on_the_stream_that_asks(
    image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pictures of a CPU, and a stream that is none."""
    here, there = loader_of(image_root, "train"), loader_of(image_root, "train", device="cuda:0")
    pictures, stream, asked, copied = here._decoder._build(), object(), [], []
    pictures.feed.start(0, range(1))
    copy = dali.feed_ndarray

    class OnAGpu:
        def run(self, stream: object) -> Any:
            asked.append(stream)
            return pictures.pipeline.run()

    def feed(level: Any, rows: torch.Tensor, cuda_stream: object) -> None:
        copied.append(cuda_stream)
        copy(level, rows)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(dali, "feed_ndarray", feed)
    there._decoder._device = torch.device("cpu")
    rows = there._decoder._render(OnAGpu(), 0, 0)
    assert asked == [stream]
    assert copied == [stream] * len(RESOLUTIONS)
    monkeypatch.undo()
    assert torch.equal(rows, next(here._decoder.rows(0, range(1))))


REAL_PIPELINE = dali.Pipeline


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref]]:
    """References to every pipeline that is made, without the help of the garbage collector."""
    made: list[weakref.ref] = []

    def make(*arguments: Any, **options: Any) -> Any:
        pipeline = REAL_PIPELINE(*arguments, **options)
        made.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali, "Pipeline", make)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pipeline_that_a_loop_leaves_ends_at_once(
    split: str, image_root: Path, pipelines: list[weakref.ref]
) -> None:
    loader = loader_of(image_root, split, 2)
    batches = iter(loader)
    next(batches)
    (left,) = pipelines
    assert left() is not None
    del batches
    assert left() is None


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pipeline_ends_with_its_loader(
    split: str, image_root: Path, pipelines: list[weakref.ref]
) -> None:
    loader = loader_of(image_root, split)
    for _ in range(2):
        assert len(list(loader)) == len(loader)
    (idle,) = pipelines  # the second epoch takes that of the first
    assert idle() is not None
    del loader
    assert idle() is None


def broken_folder(tmp_path: Path, content: Callable[[bytes], bytes]) -> tuple[Path, Path]:
    """Twelve images in val/, the tenth of which is damaged once it is in the index."""
    root = make_image_folder(tmp_path / "images", train=1, val=6)
    broken = root / "val" / "dog" / "0003.jpg"
    val_loader(root, RESOLUTIONS, 4, backend="pil", workers=0)  # indexes it
    stat = broken.parent.stat()
    broken.write_bytes(content(broken.read_bytes()))
    os.utime(broken.parent, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return root, broken


@pytest.mark.parametrize(
    "content",
    [lambda data: data[: len(data) // 2], lambda data: b"x" * len(data)],
    ids=["truncated", "junk"],
)
def test_only_the_files_of_the_step_that_failed_are_suspected(
    content: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, broken = broken_folder(tmp_path, content)
    suspected = []
    decode = dali.decode

    def decode_and_tell(index: Any, position: int) -> Image.Image:
        suspected.append(int(position))
        return decode(index, position)

    monkeypatch.setattr(dali, "decode", decode_and_tell)
    batches = iter(loader_of(root, "val"))
    assert next(batches).indices.tolist() == [0, 1, 2, 3]
    assert next(batches).indices.tolist() == [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match=re.escape(f"cannot decode {broken}")):
        next(batches)
    # DALI numbers the sample that it cannot decode, but not the one whose header it cannot read.
    assert suspected in ([9], [8, 9])


def test_a_file_that_only_dali_refuses_is_named_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, broken = broken_folder(tmp_path, lambda data: data[: len(data) // 2])
    monkeypatch.setattr(dali, "decode", lambda index, position: None)
    with pytest.raises(RuntimeError) as caught:
        list(loader_of(root, "val"))
    assert str(caught.value).startswith(
        f"DALI cannot decode {broken}: Failed to decode sample #1; to leave it out: python -m "
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pipeline_that_cannot_start_is_reported_in_words(split: str, image_root: Path) -> None:
    loader = loader_of(image_root, split, device="cuda:0")
    with pytest.raises(RuntimeError) as caught:
        next(iter(loader))
    said = str(caught.value)
    assert said.startswith("DALI cannot start on cuda:0 with 2 threads: ")
    assert "while CUDA is not available" in said
    assert said.endswith("; --loader pil does without DALI")
    assert "\n" not in said


@pytest.mark.parametrize(("version", "works"), [("2.1.3", False), ("2.2.0", True), ("10.0", True)])
def test_an_old_dali_is_refused_in_words(version: str, works: bool, tmp_path: Path) -> None:
    program = (
        f"import nvidia.dali; nvidia.dali.__version__ = {version!r}\n"
        "try:\n    import rsfast.data.dali\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    if works:
        assert not run.stdout
    else:
        assert "needs NVIDIA DALI 2.2 or later, 2.1.3 is installed: pip install" in run.stdout


@pytest.mark.parametrize(
    ("said", "suspects"),
    [
        ("Failed to decode sample #2 : \nC++ context", [6]),
        ("nvImageCodec failure: '#3'", [4, 5, 6, 7]),
        ("nvImageCodec failure: '#17'", [4, 5, 6, 7]),
        ("nvImageCodec failure: '#5'", []),  # no memory
        ("nvImageCodec failure: '#1'", []),  # not initialised
        ("CUDA allocation failed", []),
        ("Slice can't be placed out of bounds with current policy.", []),
    ],
)
def test_files_are_suspected_only_where_dali_blames_one(
    said: str, suspects: list[int], image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = loader_of(image_root, "val")._decoder
    decoded: list[int] = []
    monkeypatch.setattr(dali, "decode", lambda index, position: decoded.append(int(position)))
    story = f"Critical error in pipeline:\nError in an operator\n\nencountered:\n\n{said}"
    error = decoder._explained(RuntimeError(story), 0, 1)
    assert decoded == suspects
    words = said.partition("\n")[0].strip(" :")
    if len(suspects) == 1:
        assert str(error).startswith(f"DALI cannot decode {decoder._plan.index.path(6)}: {words}; ")
    else:  # none, or DALI decodes them all on a CPU
        assert str(error) == f"DALI failed at epoch 0, step 1: {words}"
