"""Instructions of the Triton kernels, without a GPU.

    python -m bench.models.instructions OPERATION

A kernel that streams through memory has to issue fewer instructions than the memory gives it time
for: a multiprocessor of an H200 issues 4 warp instructions per cycle and gets 18.6 bytes. For
each case of tests/kernels/compile_ahead.py: registers, programs that fit on a multiprocessor by
registers and shared memory, instructions in all and in each loop. Nothing is timed; it shows what
cannot be fast, not what is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Code", "disassemble", "main", "parse", "programs_that_fit"]

_CASES = Path(__file__).parents[2] / "tests" / "kernels" / "compile_ahead.py"
# Of a multiprocessor of compute capability 9.0.
_REGISTERS, _SHARED_BYTES, _THREADS, _BLOCKS = 65536, 227 * 1024, 2048, 32
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


class Code(NamedTuple):
    """What nvdisasm shows of a kernel.

    Attributes:
        instructions: in all, without padding.
        loops: instructions from the target of each branch backwards to the branch, in order.
    """

    instructions: int
    loops: tuple[int, ...]


def parse(listing: str) -> Code:
    """Counts the instructions of a listing of nvdisasm."""
    labels: dict[str, int] = {}
    loops: list[int] = []
    count = 0
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        found = _INSTRUCTION.search(line)
        if found is None or found[1].startswith("NOP"):
            continue
        branch = _BRANCH.search(found[1])
        start = labels.get(branch[1]) if branch else None
        if start == count and branch:  # the end of the code, which goes to itself
            continue
        count += 1
        if start is not None:
            loops.append(count - start)
    return Code(count, tuple(loops))


def disassemble(cubin: bytes) -> tuple[str, int]:
    """The listing of a compiled kernel and its registers, by the tools that come with Triton."""
    registers = re.findall(r"REG:(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin))
    return _tool("nvdisasm", "--print-code", cubin), int(registers[0])


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton  # not above: main says first that it is to compile

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def programs_that_fit(registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many fit on a multiprocessor; registers come in blocks of 256 per warp."""
    of_warp = -(-32 * registers // 256) * 256
    limits = _REGISTERS // (of_warp * num_warps), _THREADS // (32 * num_warps), _BLOCKS
    return min(*limits, _SHARED_BYTES // (shared_bytes + 1024))


def _compile_ahead() -> Any:
    spec = importlib.util.spec_from_file_location("compile_ahead", _CASES)
    if spec is None or spec.loader is None:
        raise ImportError(f"no {_CASES}: run it from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_ahead"] = module
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.models.instructions", description=__doc__)
    os.environ.pop("TRITON_INTERPRET", None)
    ahead = _compile_ahead()
    parser.add_argument("operation", choices=ahead.OPERATIONS)
    parser.add_argument("--match", default="", help="regular expression; only such cases")
    arguments = parser.parse_args(argv)
    try:
        cases = ahead.OPERATIONS[arguments.operation]()
        chosen = [case for case in cases if re.search(arguments.match, case.name)]
    except re.error as error:
        parser.error(f"match must be a regular expression, got {arguments.match!r}: {error}")
    if not chosen:
        parser.error(f"no case of {arguments.operation} matches {arguments.match!r}")
    print("| kernel | registers | programs | instructions | loops |")
    print("|---|---|---|---|---|")
    for case in chosen:
        compiled = ahead.compile_case(case, 90)
        listing, registers = disassemble(compiled.asm["cubin"])
        code = parse(listing)
        programs = programs_that_fit(registers, compiled.metadata.shared, case.options["num_warps"])
        loops = ", ".join(map(str, code.loops))
        print(f"| {case.name} | {registers} | {programs} | {code.instructions} | {loops} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
