"""Every configuration of every Triton kernel compiles for the GPUs we support, without spills.

Needs no GPU. Run with `-rP` to see the registers and the shared memory of each configuration.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPILE = Path(__file__).with_name("compile_ahead.py")
CAPABILITIES = (80, 90)
NUM_CASES = {
    "bn_act_max_pool": 30,
    "distillation_loss": 99,
    "global_avg_pool": 20,
    "normalize": 6,
    "switchable_bn_act": 182,
}


def parse(output: str) -> list[dict[str, object]]:
    """The JSON lines, each with what ptxas said before it."""
    rows: list[dict[str, object]] = []
    log: list[str] = []
    for line in output.splitlines():
        if not line.startswith("{"):
            log.append(line)
            continue
        text = "\n".join(log)
        (used,) = re.findall(r"Used (\d+) registers", text)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
        assert spills, text
        rows.append({**json.loads(line), "registers": int(used), "spills": sum(map(int, spills))})
        log = []
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("operation", NUM_CASES)
def test_kernels_compile_without_spills(operation: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # ptxas has to run for its log, also where two cases come to the same code.
    variables |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}

    def compile_for(capability: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(COMPILE), operation, str(capability)],
            capture_output=True,
            text=True,
            env={**variables, "TRITON_CACHE_DIR": str(tmp_path / f"sm_{capability}")},
        )

    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(compile_for, CAPABILITIES))
    for capability, run in zip(CAPABILITIES, runs, strict=True):
        assert run.returncode == 0, run.stderr
        rows = parse(run.stdout)
        for row in rows:
            print(f"sm_{capability}", *(f"{key}={row[key]}" for key in row))
        assert len(rows) == NUM_CASES[operation]
        assert [row for row in rows if row["spills"]] == []
