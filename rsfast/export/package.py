"""The files of an exported network: what it is, for programs and for people."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import rsfast
from rsfast.deploy.manifest import FP32_FILE, METADATA_KEY, Manifest
from rsfast.export.graph import INPUT, OUTPUT, sizes_of
from rsfast.files.pictures import VAL_SCALE
from rsfast.files.seal import link_or_copy, write_whole
from rsfast.models import RSNet

__all__ = ["LABELS_FILE", "describe", "write_card", "write_graph", "write_labels", "write_triton"]

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


def _plain(name: str) -> str:
    """A name that is a folder's, too."""
    return "".join(char if char.isalnum() else "_" for char in name)


def write_card(
    manifest: Manifest, folder: Path, accuracy: Sequence[Mapping[str, str]] | None
) -> None:
    """Writes README.md, the model card.

    Args:
        manifest: what the network is.
        folder: of the files that it lists.
        accuracy: rows of rsfast.evaluate's accuracy.csv.
    """
    sizes = ", ".join(map(str, manifest.resolutions))
    low, high = manifest.sizes
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    text = f"""# {manifest.arch or "A network"} for inputs of {sizes} pixels

An image classifier of {manifest.num_classes} classes whose input resolution is chosen at run time:
a Resolution Switchable Network (Wang et al., ECCV 2020), trained at {sizes} pixels with
[rsfast](https://pypi.org/project/rsfast/). One file serves all of them.

## Use

```python
from PIL import Image
from rsfast import deploy  # needs numpy, pillow and onnxruntime, not PyTorch

net = deploy.load(".")
images = net.preprocess([Image.open("image.jpg")], {manifest.resolutions[0]})
logits = net(images)  # [1, {manifest.num_classes}]
```

| | |
|---|---|
| input `{INPUT}` | [N, 3, r, r] {manifest.input_dtype}, RGB, square |
| r | from {low} to {high} pixels |
| output `{OUTPUT}` | [N, {manifest.num_classes}] float32; classes in the order of {LABELS_FILE} |
| geometry | {_geometry(manifest)}, bilinear with antialiasing |
| normalisation | {_normalisation(manifest)} |
| other r | {_between(manifest)} |
| weights from | {manifest.checkpoint}, SHA-256 {manifest.checkpoint_sha256} |
| written by | {versions} |

ONNX Runtime and others run the file without rsfast; they do not refuse an image that is not square
or a size that is too large, for which the network gives wrong answers.

## Files

{_files(manifest, folder)}
## Accuracy

{_accuracy(accuracy)}
"""
    write_whole(folder / "README.md", [text.encode()])


def _geometry(manifest: Manifest) -> str:
    if manifest.crop == "none":
        return "the whole image is resized to r x r"
    return f"the shorter side is resized to int(r / {manifest.scale}), the centre r x r cut out"


def _normalisation(manifest: Manifest) -> str:
    if manifest.input_dtype == "uint8":
        return "in the graph: pixels go in as they are stored"
    return f"(value / 255 - mean) / std, mean {list(manifest.mean)}, std {list(manifest.std)}"


def _between(manifest: Manifest) -> str:
    if manifest.between == "shared":
        return "one batch norm for all sizes"
    text = "batch norm interpolated between the two neighbours, the nearest outside"
    return f"{text}; in int8 the nearest" if manifest.calibration_images else text


def _files(manifest: Manifest, folder: Path) -> str:
    known = {
        FP32_FILE: "the network in float32",
        "model.int8.onnx": f"in int8, ranges from {manifest.calibration_images} training images",
        "rsfast.json": "the facts above, for programs; also in the graphs' metadata",
        LABELS_FILE: "class names",
        "reference.npz": "PyTorch's logits, which `python -m rsfast.export check .` compares",
        "validation.json": "what that check has found",
        "triton": "for the model repository of Triton Inference Server",
    }
    lines = ["| file | what |", "|---|---|"]
    for name, what in known.items():
        if name == "validation.json" or (folder / name).exists():
            lines.append(f"| {name} | {what} |")
    return "\n".join(lines) + "\n"


def _accuracy(rows: Sequence[Mapping[str, str]] | None) -> str:
    if not rows:
        return "Not stated: `rsfast.evaluate` measures it, `rsfast.export --accuracy` puts it here."
    lines = ["| resolution | top-1 (%) | top-5 (%) | multiply-adds (M) |", "|---|---|---|---|"]
    for row in rows:
        cost = int(row["multiply_adds"]) / 1e6
        top1, top5 = float(row["top1"]), float(row["top5"])
        lines.append(f"| {row['resolution']} | {top1:.2f} | {top5:.2f} | {cost:.1f} |")
    return "\n".join(lines)
