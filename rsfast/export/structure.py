"""What an exported graph must look like, without running it."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsfast.deploy.manifest import METADATA_KEY, Manifest
from rsfast.deploy.runtimes import Pin, save_optimized

__all__ = ["Line", "look_at", "loose_nodes"]

_SMALL = 4096  # bytes: constants below may be there twice
_ONCE = 1.1  # times what one resolution has; what runtimes do to small constants differs
_FROM_SHAPE = ("Shape", "ArgMin")


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: None if it could not be looked at.
        found: in words, with the value and the limit.
    """

    name: str
    passed: bool | None
    found: str


def look_at(path: Path, manifest: Manifest) -> Iterator[Line]:
    """All that can be said of one ONNX file.

    Args:
        path: of the file.
        manifest: that the folder has.

    Raises:
        ImportError: if a package of the extra `export` is absent.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("the check needs onnx: pip install 'rsfast[export]'") from error

    name = path.name
    try:
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path)
    except Exception as error:  # of onnx's C++ code and of protobuf
        yield Line(f"{name} is valid ONNX", False, str(error).strip().splitlines()[0])
        return
    yield Line(f"{name} is valid ONNX", True, _opsets(graph))
    yield _metadata(name, graph, manifest)
    for resolution in manifest.resolutions:
        pinned = _pinned(path, resolution)
        if resolution == manifest.resolutions[0]:
            yield _stored_once(name, graph, _weight_bytes(pinned))
        loose = ", ".join(f"{n} {kind}" for kind, n in Counter(loose_nodes(pinned.graph)).items())
        what = f"{name} pinned to {resolution} px is a plain network"
        yield Line(what, not loose, f"{loose or 'nothing'} left of the choice of a bank")


def _opsets(graph: Any) -> str:
    """Those that its operators are of."""
    versions = {entry.domain: entry.version for entry in graph.opset_import}
    used = sorted({node.domain for node in graph.graph.node})
    return "opsets " + ", ".join(f"{domain or 'ai.onnx'} {versions[domain]}" for domain in used)


def _metadata(name: str, graph: Any, manifest: Manifest) -> Line:
    texts = {entry.key: entry.value for entry in graph.metadata_props}
    what = f"{name} carries rsfast.json"
    if METADATA_KEY not in texts:
        return Line(what, False, f"its metadata has no {METADATA_KEY!r}")
    same = Manifest.parse(texts[METADATA_KEY], f"metadata of {name}") == manifest
    return Line(what, same, "the same" if same else "another one than the folder's")


def _weight_bytes(graph: Any) -> int:
    """Of the weights of convolutions and classifier, tables of banks left out."""
    return sum(
        entry.ByteSize()
        for entry in graph.graph.initializer
        if len(entry.dims) > 1 and not entry.name.endswith("table")
    )


def _stored_once(name: str, graph: Any, plain: int) -> Line:
    """As often as the plain network of one resolution has them."""
    seen: dict[bytes, str] = {}
    twice, total = [], 0
    for entry in graph.graph.initializer:
        size = entry.ByteSize()
        total += size
        content = hashlib.sha256(entry.raw_data or entry.SerializeToString()).digest()
        if size > _SMALL and content in seen:
            twice.append(f"{entry.name} = {seen[content]}")
        seen[content] = entry.name
    share = _weight_bytes(graph) / plain
    found = f"{total / 2**20:.1f} MiB of constants, weights {share:.2f} x those of one resolution"
    if twice:
        found += f", the same again in {', '.join(twice[:3])}"
    return Line(f"{name} has every weight once", not twice and share < _ONCE, found)


def _pinned(path: Path, resolution: int) -> Any:
    """As ONNX Runtime simplifies it for one shape."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "pinned.onnx"
        save_optimized(path, Pin(1, resolution), pinned)
        return onnx.load(pinned)


def loose_nodes(graph: Any) -> list[str]:
    """Operators that a plain network of one resolution does not have.

    Those that read a shape, and batch norms or per-channel products and sums behind a convolution
    whose output nothing else reads: a runtime makes them part of the convolution.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    constants = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    loose = [node.op_type for node in graph.node if node.op_type in _FROM_SHAPE]
    for node in graph.node:
        if node.op_type not in ("BatchNormalization", "Mul", "Add"):
            continue
        for behind, other in (node.input[:2], node.input[1::-1]):
            maker = made_by.get(behind)
            if maker is None or maker.op_type != "Conv" or readers[behind] > 1:
                continue
            if node.op_type == "BatchNormalization" or _per_channel(constants.get(other)):
                loose.append(node.op_type)
    return loose


def _per_channel(shape: tuple[int, ...] | None) -> bool:
    """Of one value for each channel: [C, 1, 1], or with batch in front."""
    return shape is not None and len(shape) in (3, 4) and shape[-2:] == (1, 1) and shape[-3] > 1
