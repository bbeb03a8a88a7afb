"""The files of an exported network: what it is, for programs and for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import rsfast
from rsfast.deploy.manifest import (
    FP32_FILE,
    INT8_FILE,
    METADATA_KEY,
    PACKED_FILE,
    VALIDATION_FILE,
    Manifest,
)
from rsfast.deploy.reference import REFERENCE_FILE
from rsfast.deploy.versions import ONNXRUNTIME_AT_LEAST
from rsfast.export.graph import INPUT, OUTPUT, sizes_of
from rsfast.export.reference import activation_bits, weight_bits
from rsfast.files.pictures import VAL_SCALE
from rsfast.files.seal import link_or_copy, write_whole
from rsfast.files.tables import read_rows
from rsfast.models import RSNet
from rsfast.models.lq import FULL_PRECISION

__all__ = [
    "LABELS_FILE",
    "describe",
    "read_accuracy",
    "write_card",
    "write_graph",
    "write_labels",
    "write_triton",
]

LABELS_FILE = "labels.txt"
_WRITERS = ("torch", "onnx", "onnxscript", "onnxruntime")
_LARGEST_BATCH = 8  # of Triton's dynamic batches


def describe(
    model: RSNet, checkpoint: Path, preprocess: bool = False, calibration_images: int = 0
) -> Manifest:
    """What rsfast.json says of a network.

    Args:
        model: the network.
        checkpoint: the file that it is from.
        preprocess: whether normalisation is part of the graph.
        calibration_images: of the int8 file; 0 if there is none.
    """
    with open(checkpoint, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Manifest(
        arch=model.arch,
        resolutions=model.resolutions,
        sizes=sizes_of(model),
        between="shared" if model.bn == "shared" else "interpolate",
        num_classes=model.num_classes,
        class_names=model.class_names,
        input_dtype="uint8" if preprocess else "float32",
        mean=tuple(model.input_mean),
        std=tuple(model.input_std),
        crop=model.val_crop,
        scale=VAL_SCALE,
        exif=model.exif,
        levels=model.levels,
        picked_from=model.picked_from,
        weight_bits=max(weight_bits(model), default=FULL_PRECISION),
        activation_bits=max(activation_bits(model), default=FULL_PRECISION),
        filter="bilinear",
        calibration_images=calibration_images,
        checkpoint=checkpoint.name,
        checkpoint_sha256=digest,
        versions={"rsfast": rsfast.__version__, **{p: metadata.version(p) for p in _WRITERS}},
    )


def write_graph(graph: Any, manifest: Manifest, folder: Path) -> Path:
    """Writes model.onnx with the manifest inside; returns its path."""
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest.text()
    path = folder / FP32_FILE
    write_whole(path, [graph.SerializeToString()])
    return path


def write_labels(manifest: Manifest, folder: Path) -> None:
    """Writes labels.txt: a class per line, by its number where names are not known."""
    names = manifest.class_names or tuple(map(str, range(manifest.num_classes)))
    write_whole(folder / LABELS_FILE, ["".join(f"{name}\n" for name in names).encode()])


def write_triton(manifest: Manifest, folder: Path) -> None:
    """Writes triton/NAME: a model of Triton Inference Server's repository, of the float32 file.

    The weights are a hard link where the file system has them.
    """
    name = _plain(manifest.arch or "rsnet")
    target = folder / "triton" / name
    (target / "1").mkdir(parents=True)
    link_or_copy(folder / FP32_FILE, target / "1" / "model.onnx")
    link_or_copy(folder / LABELS_FILE, target / LABELS_FILE)
    kind = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}[manifest.input_dtype]
    warm_ups = ",\n".join(
        f'  {{\n    name: "{r} px"\n    batch_size: 1\n    inputs {{\n      key: "{INPUT}"\n'
        f"      value {{ data_type: {kind} dims: [ 3, {r}, {r} ] zero_data: true }}\n    }}\n  }}"
        for r in manifest.resolutions
    )
    text = f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {_LARGEST_BATCH}
input [
  {{ name: "{INPUT}" data_type: {kind} dims: [ 3, -1, -1 ] }}
]
output [
  {{
    name: "{OUTPUT}"
    data_type: TYPE_FP32
    dims: [ {manifest.num_classes} ]
    label_filename: "{LABELS_FILE}"
  }}
]
dynamic_batching {{ }}
model_warmup [
{warm_ups}
]
"""
    write_whole(target / "config.pbtxt", [text.encode()])


def _turning(manifest: Manifest) -> str:
    if manifest.exif == "honour":
        return "pictures are turned as EXIF says first"
    return "EXIF's orientation is not applied"


def _plain(name: str) -> str:
    """A name that is a folder's, too."""
    return "".join(char if char.isalnum() else "_" for char in name)


def read_accuracy(path: Path) -> list[dict[str, str]]:
    """Rows of rsfast.evaluate's accuracy.csv.

    Raises:
        ValueError: if it cannot be read, or is no such file.
    """
    try:
        rows = read_rows(path)
        for row in rows:
            int(row["multiply_adds"]), float(row["top1"]), float(row["top5"]), row["resolution"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"--accuracy {path} must be a file of rsfast.evaluate: {error}") from error
    return rows


def write_card(
    manifest: Manifest, folder: Path, accuracy: Sequence[Mapping[str, str]] | None
) -> None:
    """Writes README.md, the model card.

    Args:
        manifest: what the network is.
        folder: of the files that it lists, checked.
        accuracy: rows of rsfast.evaluate's accuracy.csv.
    """
    sizes = ", ".join(map(str, manifest.resolutions))
    classes, (low, high) = manifest.num_classes, manifest.sizes
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    text = f"""# {manifest.arch or "A network"} for inputs of {sizes} pixels

An image classifier of {classes} classes whose input resolution is chosen at run time:
a Resolution Switchable Network (Wang et al., ECCV 2020), trained with rsfast. One file serves all
resolutions; a smaller one takes less time.

## Use

```python
from PIL import Image
from rsfast import deploy  # needs numpy, pillow and onnxruntime, not PyTorch

net = deploy.load("."){_precision(manifest)}
images = net.preprocess([Image.open("image.jpg")], {manifest.resolutions[0]})
logits = net(images)  # [1, {classes}]
best = logits.argmax(axis=1)  # lines of {LABELS_FILE}, counted from 0
```

| | |
|---|---|
| input `{INPUT}` | [N, 3, r, r] {manifest.input_dtype}, RGB, square |
| r | trained at {sizes} pixels; from {low} to {high} it runs, as accurate as you find it to be |
| output `{OUTPUT}` | [N, {classes}] float32, before softmax, in the order of {LABELS_FILE} |
| geometry | {_geometry(manifest)}, bilinear with antialiasing{_picking(manifest)}; \
{_turning(manifest)} |
| normalisation | {_normalisation(manifest)} |
| other r | {_between(manifest)} |
| bits | {_bits(manifest)} |
| weights from | {manifest.checkpoint}, SHA-256 {manifest.checkpoint_sha256} |
| written by | {versions} |

Other programs run the files without rsfast. Then it is on you to refuse images that are not square
or of a size out of range, which get a wrong answer and no error, and to pin both dimensions,
`batch` and `size`, for the full speed.{_versions(manifest)}

## Files

{_files(manifest, folder)}
## Accuracy

{_accuracy(accuracy, folder)}
"""
    write_whole(folder / "README.md", [text.encode()])


def _precision(manifest: Manifest) -> str:
    return '  # or deploy.load(".", precision="int8")' if manifest.calibration_images else ""


def _versions(manifest: Manifest) -> str:
    if not manifest.calibration_images:
        return ""
    oldest = ".".join(map(str, ONNXRUNTIME_AT_LEAST))
    return f" ONNX Runtime before {oldest} computes\n{INT8_FILE} wrongly, without an error."


def _geometry(manifest: Manifest) -> str:
    if manifest.crop == "none":
        return "the whole image is resized to r x r"
    return f"the shorter side is resized to int(r / {manifest.scale}), the centre r x r cut out"


def _picking(manifest: Manifest) -> str:
    if manifest.levels == "resize":
        return ""
    source = manifest.source_resolution
    return (
        f"; below {source}, r x r is picked from that of r = {source}, whose pixels "
        f"floor(i * {source} / r) it has, down and across"
    )


def _normalisation(manifest: Manifest) -> str:
    if manifest.input_dtype == "uint8":
        return "in the graph: pixels go in as they are stored"
    return f"(value / 255 - mean) / std, mean {list(manifest.mean)}, std {list(manifest.std)}"


def _bits(manifest: Manifest) -> str:
    if manifest.weight_bits == manifest.activation_bits == FULL_PRECISION:
        return "weights and activations in full precision"
    weights, activations = (
        "full precision" if bits == FULL_PRECISION else f"{bits} bits"
        for bits in (manifest.weight_bits, manifest.activation_bits)
    )
    return (
        f"quantised layers have weights of {weights} and activations of {activations}; "
        f"{FP32_FILE} holds their levels as float32"
    )


def _between(manifest: Manifest) -> str:
    if manifest.between == "shared":
        return "one batch norm for all sizes"
    text = "batch norm interpolated between the two neighbours, the nearest outside"
    return f"{text}; in int8 the nearest" if manifest.calibration_images else text


def _files(manifest: Manifest, folder: Path) -> str:
    known = {
        FP32_FILE: "the network in float32",
        INT8_FILE: f"in int8, for the ranges of {manifest.calibration_images} training images",
        PACKED_FILE: "the network for rsfast in PyTorch, its quantised weights as codes",
        "rsfast.json": "the facts above, for programs; also in the graphs' metadata",
        LABELS_FILE: "a class per line",
        REFERENCE_FILE: "PyTorch's logits, which `python -m rsfast.export check .` compares",
        VALIDATION_FILE: "what that check has found",
        "triton": "a model repository of Triton Inference Server",
    }
    lines = ["| file | what |", "|---|---|"]
    for name, what in known.items():
        if (folder / name).exists():
            lines.append(f"| {name} | {what} |")
    return "\n".join(lines) + "\n"


def _accuracy(rows: Sequence[Mapping[str, str]] | None, folder: Path) -> str:
    measured = json.loads((folder / VALIDATION_FILE).read_text())["top1"]
    lines = []
    if rows:
        lines = ["| resolution | top-1 (%) | top-5 (%) | multiply-adds (M) |", "|---|---|---|---|"]
        for row in rows:
            cost = int(row["multiply_adds"]) / 1e6
            top1, top5 = float(row["top1"]), float(row["top5"])
            lines.append(f"| {row['resolution']} | {top1:.2f} | {top5:.2f} | {cost:.1f} |")
        lines.append("")
    if measured:
        names = list(measured)
        lines += ["Of these files, top-1 (%):", "", f"| resolution | {' | '.join(names)} |"]
        lines.append("|---" * (1 + len(names)) + "|")
        for r in measured[names[0]]:
            values = " | ".join(f"{measured[name][r]:.2f}" for name in names)
            lines.append(f"| {r} | {values} |")
    return "\n".join(lines).strip() or (
        "Not stated: `rsfast.export --data` measures it, and `--accuracy` takes it from a table of "
        "`rsfast.evaluate`."
    )
