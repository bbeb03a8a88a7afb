"""What competes: ways to run one network at all of its resolutions.

- `rsfast_*`: one file, by `rsfast.deploy`; `fast` has a session per resolution, `small` one for
  all.
- `separate_*`: a file per resolution, each exported alone, each in its pinned session with the same
  options.
- `pytorch_*`: a network of `RSNet.at` per resolution, eager.
- `matmul_*`: no network but the machine's rate of matrix products, against which others are held.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsfast.deploy.manifest import FP32_FILE, INT8_FILE

__all__ = [
    "ANCHORS",
    "IMPLEMENTATIONS",
    "MATMULS",
    "MATMUL_FILE",
    "MATMUL_SIZE",
    "Implementation",
    "separate_file",
]

MATMUL_FILE = "matmul.int8.onnx"
MATMUL_SIZE = 1024  # 2 GFLOP; of 2048 the rates are lower or the same on an EPYC of 2026
_SHORT = {"onnxruntime": "ort", "openvino": "openvino"}


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run a network.

    Attributes:
        family: "rsfast", "separate", "pytorch" or "matmul".
        runtime: as of :func:`rsfast.deploy.load`; "pytorch"; "" of products in int8, which only
            ONNX Runtime has here.
        precision: "fp32", "bf16" or "int8".
        mode: "fast" or "small"; of PyTorch "channels_last" or "".
    """

    family: str
    runtime: str
    precision: str
    mode: str = ""

    @property
    def name(self) -> str:
        """As in the names of rows."""
        runtime = _SHORT.get(self.runtime, "")
        return "_".join(p for p in (self.family, runtime, self.precision, self.mode) if p)

    @property
    def arithmetic(self) -> str:
        """What decides the logits, and with them the accuracy: `accuracy` is measured once each."""
        if self.precision == "fp32":
            return "fp32"
        if self.precision == "bf16":
            return "bf16_small" if self.mode == "small" else "bf16"  # which folds no batch norm
        own = "separate" if self.family == "separate" else "one"
        return f"int8_{own}_{_SHORT[self.runtime]}"

    def files(self, folder: Path, checkpoint: Path, resolutions: tuple[int, ...]) -> list[Path]:
        """What has to be shipped.

        Args:
            folder: that :mod:`bench.deploy.files` filled.
            checkpoint: that it is from.
            resolutions: in pixels.
        """
        if self.family == "pytorch":
            return [checkpoint]
        if self.family == "separate":
            return [separate_file(folder, self.precision, r) for r in resolutions]
        return [folder / (INT8_FILE if self.precision == "int8" else FP32_FILE)]


def separate_file(folder: Path, precision: str, resolution: int) -> Path:
    """The file of one resolution alone."""
    kind = "int8" if precision == "int8" else "fp32"  # OpenVINO makes bf16 of float32 when it loads
    return folder / f"separate.{kind}.{resolution}.onnx"


IMPLEMENTATIONS = (
    *(
        Implementation("rsfast", runtime, precision, mode)
        for runtime, precision, mode in (
            ("onnxruntime", "fp32", "fast"),
            ("onnxruntime", "fp32", "small"),
            ("onnxruntime", "int8", "fast"),
            ("onnxruntime", "int8", "small"),
            ("openvino", "fp32", "fast"),
            ("openvino", "fp32", "small"),
            ("openvino", "bf16", "fast"),
            ("openvino", "bf16", "small"),
            ("openvino", "int8", "fast"),
        )
    ),
    Implementation("separate", "onnxruntime", "fp32"),
    Implementation("separate", "onnxruntime", "int8"),
    Implementation("separate", "openvino", "fp32"),
    Implementation("separate", "openvino", "bf16"),
    Implementation("pytorch", "pytorch", "fp32"),
    Implementation("pytorch", "pytorch", "fp32", "channels_last"),
)
MATMULS = tuple(Implementation("matmul", "", precision) for precision in ("fp32", "bf16", "int8"))
# What a precision's logits may not be much further from PyTorch's than.
ANCHORS = {"bf16": "separate_openvino_bf16", "int8": "separate_ort_int8"}
