"""`python -m rsfast.export check DIR`: whether an exported network is what it says, and no other.

Needs no PyTorch: what PyTorch computed is in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from rsfast.data.sources import add_val_flags, check_sources
from rsfast.deploy.manifest import (
    FP32_FILE,
    INT8_FILE,
    PACKED_FILE,
    VALIDATION_FILE,
    Manifest,
)
from rsfast.deploy.reference import Reference
from rsfast.deploy.runtimes import RUNTIMES, library
from rsfast.export import structure
from rsfast.export.structure import Line
from rsfast.files.folders import make_writable
from rsfast.files.seal import write_whole

__all__ = ["Report", "add_limits", "check", "main"]

VAL_IMAGES = 5000
_TOLERANCE = 1e-4  # of float32 logits, relative to the largest
# Rms of int8 logits, at most, against networks that were quantised alone and run in ONNX Runtime.
# OpenVINO rounds in other places: 0.5 was seen with a MobileNetV2 of random weights.
_ROUNDING = {"onnxruntime": 0.3, "openvino": 0.7}
# Of networks with quantised activations: of the images at least so many agree to the tolerance, and
# the rms of what a value on the other side of its threshold makes of an image's logits, at most.
# Logits that have nothing in common are 1.4 apart; a network of a few steps was seen at 0.7.
_STEADY = 0.2
_FLIPPED = 1.0
_TELLS_APART = 10 * _TOLERANCE  # two banks whose logits differ by less could be mistaken


@dataclass(frozen=True, slots=True)
class Report:
    """What a check has found.

    Attributes:
        lines: all that was looked at.
        top1: precision -> resolution -> accuracy in percent, measured by this or an earlier check
            of the same files.
        images: that it was measured on.
        files: names of the graphs and their SHA-256.
        runtimes: packages and their versions.
    """

    lines: list[Line]
    top1: dict[str, dict[int, float]]
    images: int
    files: dict[str, str]
    runtimes: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether nothing has failed."""
        return all(line.passed is not False for line in self.lines)

    def show(self) -> None:
        """Prints the lines."""
        words = {True: "ok", False: "FAILED", None: "not looked at"}
        for line in self.lines:
            print(f"{words[line.passed]:>13}  {line.name}: {line.found}")

    def write(self, folder: Path) -> None:
        """Writes validation.json."""
        text = json.dumps({"passed": self.passed, **asdict(self)}, indent=2)
        write_whole(folder / VALIDATION_FILE, [f"{text}\n".encode()])


def check(
    folder: Path,
    runtimes: Sequence[str] = ("onnxruntime",),
    data: str | None = None,
    max_loss: float = 1.0,
    val_images: int = VAL_IMAGES,
    labels: str | None = None,
) -> Report:
    """Looks at an exported network from all sides.

    Args:
        folder: of rsfast.export.
        runtimes: to run it with, each in a process of its own without PyTorch.
        data: folder with val/ or a pattern of archives of validation images, for the accuracy of
            the int8 file on real images.
        max_loss: points of top-1 that int8 may lose at any resolution.
        val_images: of val/ at most, spread evenly over it.
        labels: list of the labels of a val/ without class folders.

    Raises:
        ValueError: if the folder is not one of rsfast.export, or the data set is another one.
        ImportError: if a package is absent.
    """
    if val_images < 1:
        raise ValueError(f"--val-images must be at least 1, got {val_images}")
    manifest = Manifest.read(folder)
    reference = Reference.read(folder)
    if not set(reference.by_bank) <= set(manifest.resolutions) <= set(reference.logits):
        raise ValueError(f"the references in {folder} are not of {manifest.resolutions} pixels")
    versions = {name: str(library(name).__version__) for name in ("onnxruntime", *runtimes)}
    has_int8 = manifest.calibration_images > 0
    graphs = (FP32_FILE, INT8_FILE) if has_int8 else (FP32_FILE,)
    lines: list[Line] = []
    for name in graphs:
        lines += structure.look_at(folder / name, manifest)
    lines.append(_banks_differ(reference, manifest))
    if manifest.packed_sha256:
        lines += _packed(folder, reference, manifest)
    for runtime in runtimes:
        for mode in ("fast", "small"):
            lines.append(_float32(folder, runtime, mode, reference, manifest))
            if has_int8 and not (runtime == "openvino" and mode == "small"):
                lines.append(_int8(folder, runtime, mode, reference, manifest))
    files = {name: _digest(folder / name) for name in graphs}
    top1, images = _known_top1(folder, files)
    if data is not None:
        from rsfast.export import accuracy  # the rest does without Pillow and tqdm

        precisions = ("fp32", "int8") if has_int8 else ("fp32",)
        count, found = accuracy.top1(folder, manifest, data, precisions, val_images, labels)
        lines += _accuracies(found, count, max_loss)
        if count >= images:  # a quick look does not replace what is known better
            top1, images = found, count
    elif has_int8:
        lines.append(Line("int8 accuracy", None, "give --data to measure it on real images"))
    return Report(lines, top1, images, files, versions)


def _digest(path: Path) -> str:
    """Empty if the file is not there."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_top1(folder: Path, files: dict[str, str]) -> tuple[dict[str, dict[int, float]], int]:
    """What an earlier check has measured of the same graphs, and on how many images."""
    try:
        content = json.loads((folder / VALIDATION_FILE).read_text())
        if content["files"] != files:
            return {}, 0
        top1 = {name: {int(r): v for r, v in by.items()} for name, by in content["top1"].items()}
        return top1, int(content["images"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 all is well, 2 bad input, 1 the network is not what it says, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="rsfast.export check", description="Checks an exported network."
    )
    add = parser.add_argument
    add("folder", type=Path, help="of rsfast.export")
    add("--runtime", nargs="+", choices=tuple(RUNTIMES), default=["onnxruntime"])
    add("--data", metavar="DIR", help="folder with val/: accuracy is measured on it")
    add_val_flags(parser)
    add_limits(parser)
    args = parser.parse_args(argv)
    try:
        check_sources(args.data, None, args.val_data, args.val_list, both_splits=False)
        limits = (args.max_loss, args.val_images, args.val_list)
        Manifest.read(args.folder)  # it is the folder of an export, in which a file comes
        make_writable(args.folder)
        report = check(args.folder, args.runtime, args.val_data or args.data, *limits)
        report.show()
        report.write(args.folder)
    except (ValueError, ImportError) as error:
        print(f"rsfast.export check: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"rsfast.export check: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rsfast.export check: interrupted; nothing is written", file=sys.stderr)
        return 130
    return 0 if report.passed else 1


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Flags of whoever checks."""
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="of top-1 that int8 may lose at any resolution (default 1)",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        default=VAL_IMAGES,
        metavar="N",
        help=f"of val/ at most, spread evenly, to measure accuracy on (default {VAL_IMAGES})",
    )


def _banks_differ(reference: Reference, manifest: Manifest) -> Line:
    """A file with a bank in the wrong place must not pass: do the references tell banks apart?"""
    name = "banks can be told apart"
    if not reference.by_bank:
        return Line(name, None, "there is one bank for all resolutions")
    closest, pair = np.inf, (0, 0)
    for resolution, logits in reference.by_bank.items():
        own = manifest.resolutions.index(resolution)
        for bank, trained in enumerate(manifest.resolutions):
            if bank != own and (error := _error(logits[bank], logits[own])) < closest:
                closest, pair = error, (resolution, trained)
    found = f"at {pair[0]} px the bank of {pair[1]} is {closest:.1e} away, at least"
    if closest <= _TOLERANCE:
        return Line(name, None, f"at {pair[0]} px the bank of {pair[1]} is as good as the same")
    return Line(name, closest > _TELLS_APART, f"{found} {_TELLS_APART:.0e}")


def _packed(folder: Path, reference: Reference, manifest: Manifest) -> Iterator[Line]:
    name = f"{PACKED_FILE} is as written"
    same = _digest(folder / PACKED_FILE) == manifest.packed_sha256
    yield Line(name, same, f"its SHA-256 is {'' if same else 'not '}that of rsfast.json")
    name = f"{PACKED_FILE} equals PyTorch"
    if not same or find_spec("torch") is None:
        yield Line(name, None, "needs PyTorch" if same else "it is another file")
        return
    if ":" in (manifest.arch or ""):  # whose own code is run by no check
        yield Line(name, None, f"it is of {manifest.arch}, which the export has compared")
        return
    from rsfast.export import packed

    found = packed.logits_of(folder, manifest)
    outputs = {f"{len(logits)} of {r} px": (r, logits) for r, logits in found.items()}
    yield _equals_pytorch(name, outputs, reference, manifest)


def _float32(
    folder: Path, runtime: str, mode: str, reference: Reference, manifest: Manifest
) -> Line:
    name = f"{runtime} {mode} float32 equals PyTorch"
    outputs = _replay(folder, runtime, mode, "fp32")
    if isinstance(outputs, str):
        return Line(name, False, outputs)
    return _equals_pytorch(name, outputs, reference, manifest)


def _equals_pytorch(
    name: str, outputs: dict[str, tuple[int, np.ndarray]], reference: Reference, manifest: Manifest
) -> Line:
    errors = {
        key: _error(logits, reference.logits[size][: len(logits)])
        for key, (size, logits) in outputs.items()
    }
    worst = max(errors, key=errors.__getitem__)
    sizes = ", ".join(map(str, sorted({size for size, _ in outputs.values()}, reverse=True)))
    if reference.steps and errors[worst] > _TOLERANCE:
        passed, found = _but_for_steps(outputs, reference, manifest)
        return Line(name, passed, f"{found}; at {sizes} px")
    found = f"relative error {errors[worst]:.1e} ({worst}), at most {_TOLERANCE:.0e}"
    return Line(name, errors[worst] <= _TOLERANCE, f"{found}; at {sizes} px")


def _but_for_steps(
    outputs: dict[str, tuple[int, np.ndarray]], reference: Reference, manifest: Manifest
) -> tuple[bool, str]:
    """Whether a network with quantised activations is PyTorch's, and what was found.

    An activation at a threshold may fall on its other side by rounding, and then moves all that
    comes after it. That happens to some images, not to all: wrong weights or banks would.
    """
    steady, total, worst, wrong = 0, 0, 0.0, ""
    for key, (size, logits) in outputs.items():
        for image, (ours, theirs) in enumerate(zip(logits, reference.logits[size], strict=False)):
            total += 1
            if _error(ours, theirs) <= _TOLERANCE:
                steady += 1
                continue
            own = _rms(ours, theirs)
            worst = max(worst, own)
            others = list(reference.by_bank.get(size, ())) if image == 0 else []
            if others:
                others.pop(manifest.resolutions.index(size))
            if own > _FLIPPED:
                wrong = f"; image {image} of {key} is too far from PyTorch's"
            elif any(own > _rms(ours, other) for other in others):
                wrong = f"; image {image} of {key} is nearer to what another bank gives"
    found = (
        f"relative error at most {_TOLERANCE:.0e} for {steady} of {total} images, at least "
        f"{_STEADY:.0%}; rms difference of those with an activation on the other side of a "
        f"threshold {worst:.3f} of the rms, at most {_FLIPPED}"
    )
    return steady >= _STEADY * total and not wrong, found + wrong


def _int8(folder: Path, runtime: str, mode: str, reference: Reference, manifest: Manifest) -> Line:
    """Against networks that were quantised for one resolution alone, of each bank."""
    name = f"{runtime} {mode} int8 equals a file of each resolution"
    outputs = _replay(folder, runtime, mode, "int8")
    if isinstance(outputs, str):
        return Line(name, False, outputs)
    limit = _ROUNDING[runtime]
    wrong, worst, nearest = [], -np.inf, np.inf
    for key, (size, logits) in outputs.items():
        if size not in reference.int8:
            continue
        distances = [_rms(logits[0], bank) for bank in reference.int8[size]]
        own = distances.pop(manifest.resolutions.index(size))
        worst = max(worst, own)
        other = min(distances) if reference.by_bank else np.inf
        nearest = min(nearest, other)
        if own > limit or other < own / 2:
            wrong.append(key)
    if worst < 0:
        return Line(name, False, "the folder has no reference of int8: export anew")
    found = f"rms difference {worst:.3f} of the rms, at most {limit}"
    if reference.by_bank:
        found += f"; from other banks at least {nearest:.3f}"
    if wrong:
        found += f"; too far from its own, or nearer to another: {', '.join(wrong)}"
    return Line(name, not wrong, found)


def _replay(
    folder: Path, runtime: str, mode: str, precision: str
) -> dict[str, tuple[int, np.ndarray]] | str:
    """What was run -> size and logits; or why there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.npz"
        command = [sys.executable, "-m", "rsfast.deploy.replay", str(folder)]
        command += ["--runtime", runtime, "--mode", mode, "--precision", precision]
        done = subprocess.run(
            [*command, "--output", str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return last[0]
        found = {}
        with np.load(output) as file:
            for key in file.files:
                size, batch = key.split("_")
                found[f"{batch} of {size} px"] = (int(size), file[key])
    return found


def _accuracies(
    accuracy: dict[str, dict[int, float]], count: int, max_loss: float
) -> Iterator[Line]:
    for resolution, float32 in accuracy["fp32"].items():
        found = f"top-1 {float32:.2f} on {count} images"
        if "int8" not in accuracy:
            yield Line(f"accuracy at {resolution} px", True, found)
            continue
        int8 = accuracy["int8"][resolution]
        found += f", {int8:.2f} in int8, at most {max_loss:g} less"
        yield Line(f"int8 accuracy at {resolution} px", float32 - int8 <= max_loss, found)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the largest logit; infinite if there is no number."""
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return error if np.isfinite(error) else np.inf


def _rms(found: np.ndarray, wanted: np.ndarray) -> float:
    ratio = float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))
    return ratio if np.isfinite(ratio) else np.inf
