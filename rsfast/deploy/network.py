"""An exported network, ready to run at any of its resolutions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsfast.deploy.manifest import FP32_FILE, INT8_FILE, Manifest
from rsfast.deploy.preprocess import check_contract, preprocess
from rsfast.deploy.runtimes import Pin, Session, library, open_session, refuse

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Network", "load", "model_file"]


def load(
    folder: str | Path,
    runtime: str = "onnxruntime",
    mode: str = "fast",
    threads: int = 1,
    precision: str = "fp32",
    batch_sizes: Sequence[int] = (1,),
) -> Network:
    """Opens a network that `python -m rsfast.export` wrote.

    Args:
        folder: that it wrote.
        runtime: "onnxruntime" or "openvino".
        mode: "fast" has a session, and a copy of the weights, for every trained resolution and
            batch size; "small" has one session for all, which is slower and takes less memory.
        threads: to compute with.
        precision: "fp32"; "int8", where that was exported; or "bf16", with "openvino".
        batch_sizes: that "fast" has sessions for. Others run as in "small", until `prepare`.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if the runtime is absent or too old.
    """
    refuse(runtime, mode, precision)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    folder = Path(folder)
    manifest = Manifest.read(folder)
    check_contract(manifest)
    library(runtime)
    network = Network(model_file(folder, precision), manifest, runtime, mode, threads, precision)
    if mode == "fast":
        for batch in batch_sizes:
            for resolution in manifest.resolutions:
                network.prepare(resolution, batch)
    else:
        network.open_dynamic()
    return network


def model_file(folder: Path, precision: str) -> Path:
    """The ONNX file that is run in a precision.

    Raises:
        ValueError: if it is not there.
    """
    path = folder / (INT8_FILE if precision == "int8" else FP32_FILE)
    if not path.is_file():
        how = "export with --int8" if precision == "int8" else "export anew"
        raise ValueError(f"precision {precision} needs {path}, which is not there: {how}")
    return path


class Network:
    """Logits of images, at any resolution; made by :func:`load`.

    One call at a time: threads that share a network take turns by a lock of their own.

    Attributes:
        manifest: what the network expects and returns.
        runtime, mode, threads, precision: as it was loaded.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        runtime: str,
        mode: str,
        threads: int,
        precision: str,
    ) -> None:
        self.manifest = manifest
        self.runtime = runtime
        self.mode = mode
        self.threads = threads
        self.precision = precision
        self._path = path
        self._pinned: dict[Pin, Session] = {}
        self._dynamic: Session | None = None
        self._warned: set[int] = set()

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Trained, in pixels, descending."""
        return self.manifest.resolutions

    def preprocess(self, images: Sequence[Image.Image], resolution: int) -> np.ndarray:
        """Pictures as validation has seen them.

        Args:
            images: N pictures of Pillow, of any size and mode.
            resolution: r, in pixels.

        Returns:
            [N, 3, r, r] of the dtype that the network takes.

        Raises:
            ValueError: if these are no pictures, or none, or r is not one that the network takes.
        """
        self._check_size(resolution)
        return preprocess(images, resolution, self.manifest)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits.

        Args:
            images: [N, 3, r, r], as `preprocess` makes them.

        Returns:
            [N, K] float32.

        Raises:
            ValueError: naming the rule and the value, if images are of another shape or dtype.
        """
        self._check(images)
        pin = Pin(len(images), images.shape[2])
        low, high = self.resolutions[-1], self.resolutions[0]
        if not low <= pin.size <= high and pin.size not in self._warned:
            self._warned.add(pin.size)
            warnings.warn(
                f"{pin.size} pixels are outside of the trained {low} to {high}: the network runs "
                "with the batch norm of the nearest, and its accuracy is unknown",
                UserWarning,
                stacklevel=2,
            )
        session = self._pinned.get(pin) or self._dynamic or self.open_dynamic()
        return session(images)

    def prepare(self, resolution: int, batch_size: int = 1) -> None:
        """Opens a session for one resolution and batch size: full speed for a copy of the weights.

        Args:
            resolution: in pixels, trained or not.
            batch_size: N.

        Raises:
            ValueError: if it is not one that the network takes, or the mode is "small".
        """
        if self.mode != "fast":
            raise ValueError(f"prepare needs mode fast, this network was loaded in {self.mode}")
        self._check_size(resolution)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pin = Pin(int(batch_size), int(resolution))
        if pin not in self._pinned:
            self._pinned[pin] = self._open(pin)

    def open_dynamic(self) -> Session:
        """Opens, and returns, the session that takes any batch and size.

        Raises:
            ValueError: if the runtime takes no such file.
        """
        if (self.runtime, self.precision) == ("openvino", "int8"):
            known = ", ".join(f"{pin.batch} of {pin.size} pixels" for pin in self._pinned)
            raise ValueError(
                "runtime openvino takes int8 only for what is prepared (prepare(resolution, "
                f"batch_size) adds one), which is {known}"
            )
        self._dynamic = self._open(None)
        return self._dynamic

    def _open(self, pin: Pin | None) -> Session:
        return open_session(
            self._path, self.runtime, pin, threads=self.threads, precision=self.precision
        )

    def _check_size(self, resolution: int) -> None:
        low, high = self.manifest.sizes
        if not low <= resolution <= high:
            raise ValueError(f"resolution must be from {low} to {high} pixels, got {resolution}")

    def _check(self, images: np.ndarray) -> None:
        if not isinstance(images, np.ndarray):
            raise ValueError(
                f"images must be a NumPy array [N, 3, r, r], got {type(images).__name__}"
            )
        wanted = np.dtype(self.manifest.input_dtype)
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(
                "images must be [N, 3, r, r]: a batch, RGB before height and width, square, got "
                f"{list(images.shape)}"
            )
        if images.dtype != wanted:
            raise ValueError(f"images must be {wanted}, got {images.dtype}")
        if not len(images):
            raise ValueError(f"images must hold at least one, got {list(images.shape)}")
        self._check_size(images.shape[2])
