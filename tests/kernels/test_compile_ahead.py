"""Every configuration of every Triton kernel compiles for the GPUs we support, without spills.

Needs no GPU. Run with `-rP` to see the registers and the shared memory of each configuration.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Compiles in a process of its own: in this one Triton may be in interpreter mode. One JSON line for
# each configuration; ptxas prints its log, with registers and spills, before it.
COMPILE = """
import itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rsfast.kernels import DISTILL_MODES
from rsfast.kernels import _distillation_loss_triton as op
from rsfast.kernels.distillation_loss import _teacher_range

capability, num_resolutions, num_classes = map(int, sys.argv[1:])
block_k, num_warps = op.tile(num_resolutions, num_classes)
kernel = op._distillation_loss_kernel
inputs = {"labels_ptr": "*i64", "alpha_ptr": "*fp32", "stride_upstream": "i32"}
inputs |= dict.fromkeys(["hit_target", "miss_target", "teacher_weight"], "fp32")
cases = [(mode, "bf16") for mode in DISTILL_MODES] + [("full", "fp32")]
for (mode, dtype), forward in itertools.product(cases, (True, False)):
    types = inputs | {"logits_ptr": "*" + dtype}
    if forward:
        types |= {"terms_ptr": "*fp32"}
    else:
        types |= {"upstream_ptr": "*fp32", "dlogits_ptr": "*" + dtype, "dalpha_ptr": "*fp32"}
    first, last, _ = _teacher_range(mode, num_resolutions)
    constants = dict.fromkeys(kernel.arg_names)
    for name in types:
        del constants[name]
    constants |= {
        "R": num_resolutions, "K": num_classes, "BLOCK_K": block_k, "FIRST_TEACHER": first,
        "LAST_TEACHER": last, "WRITE_TERMS": forward, "WRITE_GRADS": not forward,
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, **op.OPTIONS},
    )
    print(json.dumps({
        "mode": mode, "dtype": dtype, "pass": "forward" if forward else "backward",
        "warps": num_warps, "shared_bytes": compiled.metadata.shared,
    }))
"""


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


@pytest.mark.parametrize("num_classes", [10, 1000, 32768], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("capability", [80, 90], ids=lambda c: f"sm_{c}")
def test_distillation_loss_compiles_without_spills(
    capability: int, num_classes: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), "5", str(num_classes)],
        capture_output=True,
        text=True,
        # An empty cache: ptxas has to run for its log.
        env={**variables, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = parse(done.stdout)
    for row in rows:
        print(f"sm_{capability} K={num_classes}", *(f"{key}={row[key]}" for key in row))
    assert len(rows) == 12
    assert not any(row["spills"] for row in rows)
