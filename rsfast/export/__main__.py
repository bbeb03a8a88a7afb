"""`python -m rsfast.export CHECKPOINT --output DIR`, and `python -m rsfast.export check DIR`.

The folder is made beside its place, checked, and put there only if it passes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rsfast.data.sources import add_data_flags, check_sources
from rsfast.deploy.manifest import INT8_FILE, PACKED_FILE
from rsfast.deploy.runtimes import RUNTIMES, library
from rsfast.export import check

__all__ = ["main"]

_WEIGHTS = ("averaged", "plain")  # of rsfast.training.checkpoint, which needs PyTorch
# Of an export, and what rsfast.latency has measured of it.
_REPLACED = {
    *("model.onnx", INT8_FILE, PACKED_FILE, "rsfast.json", "labels.txt", "README.md", "triton"),
    *("reference.npz", "validation.json", "latency.csv", "latency.png"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 2 bad input, 1 the export failed its check, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["check"]:
        return check.main(arguments[1:])
    args = _parse(arguments)
    try:
        args.output = args.output.resolve()  # behind a link, and with a name
        _refuse_early(args)
        with tempfile.TemporaryDirectory(
            dir=_parent(args.output), prefix=f".{args.output.name}."
        ) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            write_card = _export(args, folder)
            limits = (args.max_loss, args.val_images, args.val_list)
            report = check.check(folder, args.runtime, args.val_data or args.data, *limits)
            report.show()
            if not report.passed:
                print(f"rsfast.export: error: {args.output} is not written", file=sys.stderr)
                return 1
            report.write(folder)
            write_card()  # which says what the check has measured
            _put(folder, args.output)
    except (ValueError, ImportError) as error:
        print(f"rsfast.export: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"rsfast.export: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A number is the system's: of a file that is written, for what is read has its sentence.
        place = "" if error.errno is None else f"{args.output} cannot be written: "
        print(f"rsfast.export: error: {place}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rsfast.export: interrupted; {args.output} is not written", file=sys.stderr)
        return 130
    print(f"written: {', '.join(str(path) for path in sorted(args.output.iterdir()))}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rsfast.export",
        description="Writes a network as one ONNX file for every resolution, and checks it; "
        "`rsfast.export check DIR` checks again.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="of rsfast (model_best.pt, last.pt) or of the authors' code")
    add("--output", type=Path, required=True, help="folder to write")
    add("--arch", help="what the checkpoint is of; needed for MODULE:FUNCTION, which is then run")
    add(
        "--trained-resolutions",
        type=int,
        nargs="+",
        metavar="R",
        help="of an authors' checkpoint not at 224..96",
    )
    add("--preprocess", action="store_true", help="put normalisation into the graph: uint8 in")
    add(
        "--weights",
        choices=_WEIGHTS,
        help="of a run with --ema-decay: the averages, or what they are averages of; by default "
        "the averages where there are some",
    )
    add(
        "--int8",
        action="store_true",
        help="write model.int8.onnx, too; needs --data, or --train-data and --val-data",
    )
    about = "folder with train/, to calibrate int8 on, and val/, to measure its loss"
    add_data_flags(parser, about)
    add("--calibration-images", type=int, default=512, help="of train/ (default 512)")
    check.add_limits(parser)
    add("--accuracy", type=Path, help="accuracy.csv of rsfast.evaluate, for the model card")
    add(
        "--packed",
        action="store_true",
        help=f"of a quantised network, write {PACKED_FILE}, too: its weights as codes, for "
        "rsfast.checkpoint.load_model",
    )
    add("--triton", action="store_true", help="write a model of Triton Inference Server, too")
    add(
        "--runtime",
        nargs="+",
        choices=tuple(RUNTIMES),
        default=["onnxruntime"],
        help="to check it with (default onnxruntime)",
    )
    return parser.parse_args(argv)


def _refuse_early(args: argparse.Namespace) -> None:
    """Before any work."""
    if args.int8 and not (args.data or args.train_data or args.val_data):
        raise ValueError(
            "--int8 needs --data, a folder with train/ and val/, to calibrate on, or --train-data "
            "and --val-data"
        )
    named = args.data, args.train_data, args.val_data, args.val_list
    check_sources(*named, both_splits=args.int8)
    if args.calibration_images < 1:
        raise ValueError(f"--calibration-images must be at least 1, got {args.calibration_images}")
    for runtime in args.runtime:
        library(runtime)
    if args.output.exists():
        _refuse_foreign(args.output)


def _refuse_foreign(output: Path) -> None:
    """What was not written by an export, or measured of one, is not replaced."""
    if not output.is_dir() or os.path.ismount(output):
        raise ValueError(f"--output {output} must be a folder, and no mount point")
    if foreign := sorted({entry.name for entry in output.iterdir()} - _REPLACED):
        raise ValueError(
            f"--output {output} must be a folder that is not there, an empty one, or one of an "
            f"earlier export, which is then replaced: it holds {', '.join(foreign[:3])}"
        )


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _export(args: argparse.Namespace, folder: Path) -> Callable[[], None]:
    """All files that are checked; returns what writes the card afterwards."""
    from rsfast.export import graph, images, package, packed, reference
    from rsfast.training.checkpoint import load_model

    graph.import_onnx()
    accuracy = package.read_accuracy(args.accuracy) if args.accuracy else None
    model, alpha = load_model(args.checkpoint, args.trained_resolutions, args.arch, args.weights)
    graph.refuse_other_tasks(model)
    if args.int8 and (bits := reference.activation_bits(model)):
        raise ValueError(
            f"--int8 is for activations in full precision, those of {args.checkpoint} have "
            f"{' and '.join(map(str, bits))} bits: leave it away"
        )
    manifest = package.describe(model, args.checkpoint, args.preprocess)
    if args.packed:
        manifest = replace(manifest, packed_sha256=packed.write(model, alpha, folder))
    if args.int8:
        count, batches = images.calibration(
            args.train_data or args.data, manifest, args.calibration_images
        )
        manifest = replace(manifest, calibration_images=count)
    manifest.write(folder)
    package.write_labels(manifest, folder)
    expected = reference.compute(model, manifest)
    if args.packed:
        packed.check_same(folder, expected, manifest, args.arch)
    path = package.write_graph(graph.to_onnx(model, args.preprocess), manifest, folder)
    if args.int8:
        from rsfast.export.quantize import quantize

        by_bank = quantize(path, folder / INT8_FILE, manifest, batches)
        expected = replace(expected, int8=by_bank)
    expected.write(folder)
    if args.triton:
        package.write_triton(manifest, folder)
    return partial(package.write_card, manifest, folder, accuracy)


def _put(folder: Path, output: Path) -> None:
    """In the place of what is there, which is removed last."""
    old = folder.with_name("old")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(folder, output)
    except BaseException:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
