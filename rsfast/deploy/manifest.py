"""rsfast.json: what an exported network expects and returns, readable without PyTorch."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rsfast.files.seal import write_whole

__all__ = [
    "FP32_FILE",
    "INT8_FILE",
    "MANIFEST_FILE",
    "METADATA_KEY",
    "PACKED_FILE",
    "VALIDATION_FILE",
    "Manifest",
]

FP32_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
MANIFEST_FILE = "rsfast.json"
PACKED_FILE = "model.packed.safetensors"
VALIDATION_FILE = "validation.json"  # what `rsfast.export check` has found
METADATA_KEY = "rsfast"  # of the graph's metadata, whose value is the text of rsfast.json
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What goes into an exported network and what comes out.

    The graph's input is `images` [N, 3, r, r], RGB, square, of any r in `sizes`; its output is
    `logits` [N, num_classes] float32.

    Attributes:
        arch: the network's name; None if it has none.
        resolutions: trained, in pixels, descending.
        sizes: the smallest and largest r that the graph takes.
        between: the batch norm of an r that was not trained: "interpolate" linearly in pixels
            between the two neighbours, "shared" where all resolutions have one. Outside the
            trained range it is the nearest one's; the int8 file takes the nearest everywhere.
        num_classes: K.
        class_names: K names, if they are known.
        input_dtype: "float32", normalised, or "uint8", as pixels are stored, where normalisation
            is part of the graph.
        mean, std: per channel, of values in [0, 1]; normalised is (value / 255 - mean) / std.
        crop: "center": the shorter side is resized to int(r / scale) and the centre r x r cut out;
            "none": the whole image is resized to r x r.
        scale: share of the shorter side that a centre crop keeps.
        exif: "honour": pictures are turned as EXIF's orientation says before they are resized;
            "ignore": they are taken as stored.
        levels: "resize": pictures are resized to each r; "nearest": to R, and pixels
            floor(i * R / r) of it, down and across, make a smaller r; a larger one is resized.
        picked_from: R, in pixels; None for the largest of `resolutions`.
        filter: of the resizing, "bilinear" with antialiasing (Pillow's).
        calibration_images: that the int8 file's ranges were taken from; 0 where there is no file.
        checkpoint: name of the file that was exported.
        checkpoint_sha256: its digest.
        versions: of rsfast and of the packages that wrote the files.
        packed_sha256: the digest of the packed file of a quantised network; empty where there is
            none.
        weight_bits, activation_bits: of quantised layers, the most where they differ; 32 where
            none is quantised.
    """

    arch: str | None
    resolutions: tuple[int, ...]
    sizes: tuple[int, int]
    between: str
    num_classes: int
    class_names: tuple[str, ...] | None
    input_dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: str
    scale: float
    filter: str
    calibration_images: int
    checkpoint: str
    checkpoint_sha256: str
    versions: dict[str, str]
    # What rsfast.json of older versions does not name:
    exif: str = "ignore"
    levels: str = "resize"
    picked_from: int | None = None
    packed_sha256: str = ""
    weight_bits: int = 32
    activation_bits: int = 32

    @property
    def source_resolution(self) -> int:
        """R of `picked_from`, also where that is None."""
        return self.picked_from or self.resolutions[0]

    def text(self) -> str:
        """As in rsfast.json."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Writes rsfast.json."""
        write_whole(folder / MANIFEST_FILE, [self.text().encode()])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a folder.

        Raises:
            ValueError: if the file is missing or not of this format.
        """
        path = folder / MANIFEST_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{folder} must be a folder of rsfast.export with {MANIFEST_FILE}: {error}"
            ) from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> Manifest:
        """That of a text.

        Args:
            text: of rsfast.json.
            source: to name in errors.

        Raises:
            ValueError: if it is not of this format.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is damaged: {error}") from error
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != _FORMAT:
            raise ValueError(f"{source} must be of format {_FORMAT}, got {found!r}")
        younger = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        content = {**younger, **content}
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ set(content)):
            raise ValueError(f"{source} must have the entries {sorted(names)}, differs in {odd}")
        return cls(**{name: _of_type(name, value, source) for name, value in content.items()})


def _of_type(name: str, value: Any, source: str) -> Any:
    """A value as the field wants it: JSON has lists where there are tuples here."""
    wanted = get_type_hints(Manifest)[name]
    origins = {getattr(kind, "__origin__", kind) for kind in get_args(wanted) or (wanted,)}
    if getattr(wanted, "__origin__", None) in (tuple, dict):
        origins = {wanted.__origin__}
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple(origins)):
        raise ValueError(f"{source} must have another kind of {name} than {value!r}")
    return value
