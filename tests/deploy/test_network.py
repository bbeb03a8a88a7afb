"""That an exported network computes in each runtime what it did in PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy_helpers import RESOLUTIONS, Exported, export_small, pixels
from helpers import smooth_image
from rsfast.deploy import Manifest, load, network, runtimes
from rsfast.deploy.manifest import FP32_FILE, INT8_FILE
from rsfast.deploy.runtimes import MODES, RUNTIMES, openvino_core
from rsfast.export.quantize import quantize

BETWEEN, OUTSIDE = 57, 96


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"needs {request.param}")
    return request.param


def relative_error(found: np.ndarray, exported: Exported, images: np.ndarray) -> float:
    with torch.no_grad():
        wanted = exported.model.at(images.shape[2])(torch.from_numpy(images)).numpy()
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_network_at_every_size(
    mode: str, threads: int, runtime: str, exported: Exported
) -> None:
    net = load(exported.folder, runtime, mode, threads, batch_sizes=(1, 2))
    sizes = (*net.resolutions, BETWEEN, OUTSIDE, *net.resolutions)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"{OUTSIDE} pixels are outside")
        for batch in (1, 2, 3):
            for size in sizes:
                images = pixels(batch, size, seed=batch)
                assert relative_error(net(images), exported, images) <= 1e-4, (batch, size)


def test_banks_differ_by_more_than_the_tests_allow(exported: Exported) -> None:
    images = torch.from_numpy(pixels(2, 48))
    with torch.no_grad():
        own, *others = (exported.model.at(r)(images) for r in (48, 64, 32))
    for other in others:
        assert (own - other).abs().max() > 0.01 * own.abs().max()


@pytest.fixture(scope="module")
def with_int8(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = shutil.copytree(exported.folder, tmp_path_factory.mktemp("int8") / "copy")
    batches = [pixels(8, max(RESOLUTIONS), seed) for seed in range(4)]
    quantize(
        folder / FP32_FILE,
        folder / INT8_FILE,
        Manifest.read(folder),
        lambda r: (batch[..., :r, :r] for batch in batches),
    )
    return Exported(folder, exported.model)


@pytest.mark.parametrize(
    ("runtime", "mode"), [("onnxruntime", "fast"), ("onnxruntime", "small"), ("openvino", "fast")]
)
def test_int8_is_near_at_every_trained_size_and_the_same_everywhere(
    runtime: str, mode: str, with_int8: Exported
) -> None:
    pytest.importorskip(runtime, reason=f"needs {runtime}")
    net = load(with_int8.folder, runtime, mode, precision="int8", batch_sizes=(1, 3))
    other = load(with_int8.folder, mode="small", precision="int8")
    for batch in (1, 3):
        for size in (*RESOLUTIONS, *RESOLUTIONS):
            images = pixels(batch, size, seed=9)
            found = net(images)
            assert 0 < relative_error(found, with_int8, images) < 0.02, (batch, size)
            assert np.abs(found - other(images)).max() <= 0.005 * np.abs(found).max()


def test_bfloat16_is_near_and_needs_a_cpu_that_has_it(exported: Exported) -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ValueError, match="precision bf16 needs a CPU"):
            load(exported.folder, "openvino", precision="bf16")
        return
    images = pixels(1, 48)
    found = load(exported.folder, "openvino", precision="bf16")(images)
    assert relative_error(found, exported, images) < 0.05
    assert not np.array_equal(found, load(exported.folder, "openvino")(images))


def test_logits_stay_when_the_next_are_computed(runtime: str, exported: Exported) -> None:
    net = load(exported.folder, runtime)
    first = net(pixels(1, 48, seed=1))
    kept = first.copy()
    net(pixels(1, 48, seed=2))
    assert np.array_equal(first, kept)


def test_images_need_not_be_contiguous(runtime: str, exported: Exported) -> None:
    net = load(exported.folder, runtime)
    images = pixels(1, 48)
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(net(turned), net(images))
    assert np.array_equal(net(images[..., ::-1]), net(images[..., ::-1].copy()))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pin of each session that is opened from here on."""
    pins = []

    def open_session(path: Path, runtime: str, pin: Any, **settings: Any) -> Any:
        pins.append(pin)
        return runtimes.open_session(path, runtime, pin, **settings)

    monkeypatch.setattr(network, "open_session", open_session)
    return pins


def test_fast_opens_a_session_per_resolution_and_one_for_the_rest(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = opened(monkeypatch)
    net = load(exported.folder, batch_sizes=(1, 3))
    assert pins == [(n, r) for n in (1, 3) for r in net.resolutions]
    for batch, size in ((1, 48), (3, 64), (3, 32)):
        net(pixels(batch, size))
    assert len(pins) == 6, "what is pinned is used"
    for batch, size in ((2, 48), (1, BETWEEN), (4, 40)):
        net(pixels(batch, size))
    assert pins[6:] == [None], "one session for all others"
    net.prepare(BETWEEN)
    net.prepare(BETWEEN)
    assert pins[7:] == [(1, BETWEEN)]


def test_small_opens_one_session(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = opened(monkeypatch)
    net = load(exported.folder, mode="small")
    for batch, size in ((1, 48), (3, 64), (2, BETWEEN)):
        net(pixels(batch, size))
    assert pins == [None]
    with pytest.raises(ValueError, match=r"prepare needs mode fast, .* small"):
        net.prepare(48)


def test_a_pinned_session_takes_no_other_shape(runtime: str, exported: Exported) -> None:
    """Otherwise nothing would be folded."""
    path, pin = exported.folder / "model.onnx", runtimes.Pin(1, 48)
    session = runtimes.open_session(path, runtime, pin, threads=1, precision="fp32")
    session(pixels(1, 48))
    for shape in ((2, 48), (1, 64)):
        with pytest.raises(Exception, match=r"(?i)invalid dim|shape|incompatible"):
            session(pixels(*shape))


@pytest.mark.parametrize("mode", MODES)
def test_threads_of_onnx_runtime_do_not_spin(
    mode: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last session would hold the cores that the next one needs."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    opened = []

    def session(*arguments: Any, **settings: Any) -> Any:
        opened.append(made(*arguments, **settings))
        return opened[-1]

    made = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load(exported.folder, mode=mode, threads=2)
    assert len(opened) == (3 if mode == "fast" else 1)
    for options in (session.get_session_options() for session in opened):
        assert options.intra_op_num_threads == 2
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_openvino_binds_no_threads_to_cores(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks in several processes would all be bound to the first cores."""
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    opened = []

    def compile_model(*arguments: Any) -> Any:
        opened.append(compiled(*arguments))
        return opened[-1]

    compiled = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    load(exported.folder, "openvino", "small", threads=2)
    (model,) = opened
    assert model.get_property("ENABLE_CPU_PINNING") is False
    assert model.get_property("INFERENCE_NUM_THREADS") == 2
    assert model.get_property("NUM_STREAMS") == 1


def test_pictures_go_in_and_logits_come_out(runtime: str, exported: Exported) -> None:
    net = load(exported.folder, runtime)
    pictures = [Image.new("RGB", (90, 60), color) for color in ("red", "blue")]
    images = net.preprocess(pictures, 48)
    logits = net(images)
    assert logits.shape == (2, 5)
    assert relative_error(logits, exported, images) <= 1e-4


def test_a_graph_that_normalises_takes_the_stored_values(
    runtime: str, exported: Exported, tmp_path: Path
) -> None:
    export_small(tmp_path, preprocess=True)
    net, outside = load(tmp_path, runtime), load(exported.folder, runtime)
    pictures = [smooth_image(70, 90, np.random.default_rng(seed)) for seed in range(2)]
    for size in (48, BETWEEN):
        stored = net.preprocess(pictures, size)
        assert stored.dtype == np.uint8
        wanted = outside(outside.preprocess(pictures, size))
        assert np.abs(net(stored) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_signal_that_python_handles_is_no_crash_once_networks_are_closed(
    runtime: str, exported: Exported
) -> None:
    code = f"""
import os, signal
import rsfast.deploy
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
nets = [rsfast.deploy.load({str(exported.folder)!r}, {runtime!r}) for _ in range(2)]
while nets:
    del nets[0]
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


WITHOUT = """
import sys, time

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} must not be imported")

sys.meta_path.insert(0, Refused())
start = time.perf_counter()
import rsfast.deploy
print(time.perf_counter() - start)
"""


def run_without(blocked: set[str], code: str = "") -> float:
    """Runs code in a process that cannot import these packages; seconds of the import."""
    script = WITHOUT.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[0])


def test_it_imports_quickly_and_nothing_that_it_may_do_without() -> None:
    blocked = {"torch", "onnx", "onnxruntime", "openvino", "PIL", "matplotlib", "scipy"}
    assert min(run_without(blocked) for _ in range(3)) < 0.5  # s


def test_it_runs_without_torch(exported: Exported, runtime: str) -> None:
    code = f"""
from PIL import Image
net = rsfast.deploy.load({str(exported.folder)!r}, {runtime!r})
logits = net(net.preprocess([Image.new("RGB", (50, 60), "red")], 48))
assert logits.shape == (1, 5)
"""
    run_without({"torch", "onnx", "matplotlib"}, code)
