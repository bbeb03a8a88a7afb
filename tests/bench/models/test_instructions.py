"""Instructions are counted as they stand in a listing, and in what Triton compiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.models import instructions

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FFMA R2, R2, R3, R4 ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   FADD R2, R2, 1 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
        /*0080*/                   NOP;
"""


def test_loops_are_counted_and_what_follows_the_end_is_not() -> None:
    assert instructions.parse(LISTING) == (7, (2, 5))


def test_a_program_has_the_registers_and_the_shared_memory_of_a_multiprocessor() -> None:
    assert instructions.programs_that_fit(128, 0, 8) == 2
    assert instructions.programs_that_fit(129, 0, 8) == 1
    assert instructions.programs_that_fit(32, 100 * 1024, 4) == 2
    assert instructions.programs_that_fit(32, 0, 4) == 16


def run_command(*flags: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: kernels that it loads are compiled ones ever after."""
    pytest.importorskip("triton", reason="needs Triton")
    command = [sys.executable, "-m", "bench.models.instructions", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])


def test_the_command_lists_kernels() -> None:
    run = run_command("normalize", "--match", "C=4 bf16")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()[2:]
    name, registers, programs, count, _ = (cell.strip() for cell in line.split("|")[1:-1])
    assert name == "_normalize_kernel C=4 bf16"
    assert 8 <= int(registers) <= 255
    assert 1 <= int(programs) <= 32
    assert 20 <= int(count) <= 2000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["conv9d"], "invalid choice: 'conv9d' (choose from"),
        (["normalize", "--match", "("], "match must be a regular expression, got '('"),
        (["normalize", "--match", "conv"], "no case of normalize matches 'conv'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_named(argv: list[str], message: str) -> None:
    run = run_command(*argv)
    assert run.returncode == 2
    assert message in run.stderr
