"""A check that finds nothing is worth nothing: each fault is put in and must be found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rsfast.deploy.manifest import FP32_FILE, METADATA_KEY, VALIDATION_FILE, Manifest
from rsfast.deploy.reference import REFERENCE_FILE, Reference, patterns, reference_sizes
from rsfast.export.check import check, main
from rsfast.export.structure import loose_nodes


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "small"))


def failures(folder: Path) -> list[str]:
    return [line.name for line in check(folder).lines if line.passed is False]


def change(folder: Path, how: Callable[[onnx.ModelProto], None]) -> None:
    graph = onnx.load(folder / FP32_FILE)
    how(graph)
    onnx.save(graph, folder / FP32_FILE)


def table_of(graph: onnx.ModelProto) -> onnx.TensorProto:
    """[R, 4 C_total], the values of all banks."""
    (table,) = (entry for entry in graph.graph.initializer if entry.name.endswith("table"))
    return table


def test_a_good_export_passes_in_both_runtimes(exported: Path) -> None:
    report = check(exported, ("onnxruntime", "openvino"))
    assert all(line.passed for line in report.lines), report.lines
    assert len([line for line in report.lines if "equals PyTorch" in line.name]) == 4
    report.write(exported)
    content = json.loads((exported / VALIDATION_FILE).read_text())
    assert content["passed"]
    assert len(content["lines"]) == len(report.lines)


def test_a_bank_in_the_wrong_place_is_found(folder: Path) -> None:
    def swap(graph: onnx.ModelProto) -> None:
        table = table_of(graph)
        values = numpy_helper.to_array(table)[[0, 2, 1]]
        table.CopyFrom(numpy_helper.from_array(values, table.name))

    change(folder, swap)
    assert failures(folder) == [
        f"onnxruntime {mode} float32 equals PyTorch" for mode in ("fast", "small")
    ]


def test_a_small_change_of_one_weight_is_found(folder: Path) -> None:
    def scale(graph: onnx.ModelProto) -> None:
        (weight,) = (e for e in graph.graph.initializer if e.name.endswith("conv2.weight"))
        weight.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weight), weight.name))

    change(folder, scale)
    assert "onnxruntime small float32 equals PyTorch" in failures(folder)


def test_weights_that_are_there_twice_are_found(folder: Path) -> None:
    def double(graph: onnx.ModelProto) -> None:
        for name in ("first", "second"):
            values = np.arange(5000, dtype=np.float32)
            graph.graph.initializer.append(numpy_helper.from_array(values, name))

    change(folder, double)
    assert failures(folder) == ["model.onnx has every weight once"]


def test_weights_of_all_resolutions_are_found(folder: Path) -> None:
    def copy(graph: onnx.ModelProto) -> None:
        (weight,) = (e for e in graph.graph.initializer if e.name.endswith("conv2.weight"))
        values = numpy_helper.to_array(weight)
        for factor in (0.5, 2.0):  # as batch norms of other resolutions would scale them
            entry = numpy_helper.from_array(factor * values, f"conv2.{factor}")
            graph.graph.initializer.append(entry)

    change(folder, copy)
    assert failures(folder) == ["model.onnx has every weight once"]


def test_another_manifest_than_the_graphs_is_found(folder: Path) -> None:
    replace(Manifest.read(folder), crop="none").write(folder)
    assert failures(folder) == ["model.onnx carries rsfast.json"]


def test_a_graph_without_a_manifest_is_found(folder: Path) -> None:
    change(folder, lambda graph: graph.metadata_props.clear())
    (line,) = (line for line in check(folder).lines if line.passed is False)
    assert METADATA_KEY in line.found


def test_banks_that_can_hardly_be_told_apart_are_found(folder: Path) -> None:
    reference = Reference.read(folder)
    own = np.repeat(reference.logits[64][:1], 3, axis=0)
    replace(reference, by_bank={64: own * [[1.0], [1.0005], [2.0]]}).write(folder)
    assert failures(folder) == ["banks can be told apart"]
    replace(reference, by_bank={64: own}).write(folder)  # of a network that was just converted
    assert not failures(folder)


def test_a_damaged_graph_is_found(folder: Path) -> None:
    content = (folder / FP32_FILE).read_bytes()
    (folder / FP32_FILE).write_bytes(content[: len(content) // 2])
    assert "model.onnx is valid ONNX" in failures(folder)


def test_references_of_another_format_are_refused(folder: Path) -> None:
    with np.load(folder / REFERENCE_FILE) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(folder / REFERENCE_FILE, **{**arrays, "format": np.array(0)})
    with pytest.raises(ValueError, match="must be of format 1, got 0: export anew"):
        check(folder)


def test_a_check_without_data_keeps_what_one_with_data_has_measured(folder: Path) -> None:
    report = check(folder)
    replace(report, top1={"fp32": {64: 70.0, 48: 60.0, 32: 50.0}}).write(folder)
    assert check(folder).top1 == {"fp32": {64: 70.0, 48: 60.0, 32: 50.0}}
    change(folder, lambda graph: graph.graph.initializer.reverse())
    assert check(folder).top1 == {}, "of another file"


@pytest.mark.parametrize("name", [REFERENCE_FILE, "rsfast.json", FP32_FILE])
def test_a_missing_file_is_one_sentence(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    assert main([str(folder)]) == (1 if name == FP32_FILE else 2)
    assert name in "".join(capsys.readouterr())


def test_what_a_convolution_should_have_taken_in_is_loose() -> None:
    channels = numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "channels")
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "weight")
    vector = numpy_helper.from_array(np.ones(4, np.float32), "vector")
    conv = onnx.helper.make_node("Conv", ["x", "weight"], ["y"])
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])

    def loose(*nodes: onnx.NodeProto) -> list[str]:
        constants = [channels, weight, vector]
        return loose_nodes(onnx.helper.make_graph(nodes, "g", [image], [], constants))

    make = onnx.helper.make_node
    norm = make("BatchNormalization", ["y", "vector", "vector", "vector", "vector"], ["z"])
    assert loose(conv, norm) == ["BatchNormalization"]
    assert loose(conv, make("Mul", ["y", "channels"], ["z"])) == ["Mul"]
    assert loose(conv, make("Shape", ["y"], ["z"])) == ["Shape"]
    assert not loose(conv, make("Add", ["y", "y"], ["z"])), "a residual"
    assert not loose(conv, make("Relu", ["y"], ["z"]), make("Mul", ["z", "channels"], ["w"]))
    assert not loose(norm), "in front of its convolution"


def check_without(folder: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import these."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        f"from rsfast.export.__main__ import main; sys.exit(main(['check', {str(folder)!r}]))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_checking_needs_no_pytorch(exported: Path) -> None:
    done = check_without(exported, "torch", "PIL", "tqdm", "matplotlib")
    assert done.returncode == 0, done.stderr


def test_checking_names_the_package_that_it_needs(exported: Path) -> None:
    done = check_without(exported, "torch", "onnx")
    assert done.returncode == 2
    assert done.stderr.endswith("the check needs onnx: pip install 'rsfast[export]'\n")


def test_patterns_are_smooth_different_and_possible_pixels(exported: Path) -> None:
    manifest = Manifest.read(exported)
    stored = patterns(64, replace(manifest, input_dtype="uint8"))
    assert stored.dtype == np.uint8
    assert stored.shape == (3, 3, 64, 64)
    assert 40 < stored.std() < 60
    values = stored.astype(float)
    assert np.abs(np.diff(values, axis=-1)).mean() < 0.5 * values.std()
    assert np.abs(values[0] - values[1]).mean() > 0.5 * values.std()
    images = patterns(64, manifest)
    mean, std = (np.reshape(part, (3, 1, 1)) for part in (manifest.mean, manifest.std))
    np.testing.assert_allclose(images, (values / 255 - mean) / std, atol=1e-6)


def test_references_cover_trained_sizes_those_between_and_outside() -> None:
    assert reference_sizes((64, 48, 32), (16, 128)) == [128, 80, 64, 56, 48, 40, 32, 24, 16]
    assert reference_sizes((64,), (64, 64)) == [64]
