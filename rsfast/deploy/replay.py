"""`python -m rsfast.deploy.replay DIR`: the logits of the reference's images, by one runtime.

`rsfast.export check` runs it in processes of their own: PyTorch is not loaded there, and a runtime
that crashes takes nothing with it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsfast.deploy.network import load
from rsfast.deploy.reference import BATCH, patterns, reference_sizes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes an .npz of "SIZE_BATCH" -> logits, each a batch of the first images of that size."""
    parser = argparse.ArgumentParser(prog="rsfast.deploy.replay", description=__doc__)
    parser.add_argument("folder", type=Path)
    for flag in ("--runtime", "--mode", "--precision"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if "torch" in sys.modules:
        raise AssertionError("PyTorch has been loaded, which a deployed network must do without")
    try:
        how = {name: getattr(args, name) for name in ("runtime", "mode", "precision")}
        found = {}
        for batch in range(1, BATCH + 1):  # sessions of one batch size at a time
            net = load(args.folder, **how, batch_sizes=(batch,))
            for size in _sizes(net.manifest.resolutions, net.manifest.sizes, args):
                images = patterns(size, net.manifest)[:batch]
                with warnings.catch_warnings():  # of sizes outside of the trained ones
                    warnings.simplefilter("ignore", UserWarning)
                    found[f"{size}_{batch}"] = net(images)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    np.savez(args.output, **found)  # type: ignore[arg-type]
    return 0


def _sizes(
    resolutions: Sequence[int], limits: tuple[int, int], args: argparse.Namespace
) -> list[int]:
    """Sessions of single sizes are costly to open: those of the trained ones only."""
    return list(resolutions) if args.mode == "fast" else reference_sizes(resolutions, limits)


if __name__ == "__main__":
    sys.exit(main())
