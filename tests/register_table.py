"""Which compiled kernels are known: tests/kernels/registers.json, and a cache beside the tests.

A kernel compiled ahead of time has a key: its source with that of every function it calls, types,
constants, options, GPU and Triton. What has the key of the committed table, or is in the cache,
need not be compiled again to know its registers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

__all__ = [
    "CAPABILITIES",
    "TABLE",
    "all_keys",
    "compile_for_real",
    "find_or_compile",
    "key_of",
    "main",
    "read_table",
]

CAPABILITIES = (80, 90)
TABLE = Path(__file__).parent / "kernels" / "registers.json"
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled_kernels"  # ignored by git
_COMPILE = Path(__file__).parent / "kernels" / "compile_ahead.py"

Row = dict[str, Any]  # key, triton, registers, shared_bytes, warps; spills where compiled
Rows = dict[tuple[str, int], Row]  # of an operation, by name of the case and capability
Operations = Mapping[str, Callable[[], Iterator[Any]]]  # cases of compile_ahead.py


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    """Its code without what is said of it, and that of everything it refers to in its module."""
    code = inspect.getsource(function)
    skipped = (tokenize.COMMENT, tokenize.NL)
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    said = [token for token in tokens if token.type not in skipped]
    parts = [
        token.string
        for before, token in itertools.pairwise(said)
        # A text in front of all statements is a docstring.
        if not (before.type == tokenize.INDENT and token.type == tokenize.STRING)
    ]
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        if hasattr(value, "fn"):  # compiled or interpreted by Triton
            parts.append(_source(value.fn))
        elif isinstance(value, int | float | str):
            parts.append(f"{name}={value!r}")
    return "\n".join(parts)


def key_of(case: Any, capability: int) -> str:
    parts = _source(case.kernel.fn), case.types, case.constants, case.options
    text = json.dumps([*parts, capability, triton.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_keys(cases: Iterable[Any]) -> dict[tuple[str, int], str]:
    cases = list(cases)
    keys = {(case.name, sm): key_of(case, sm) for case in cases for sm in CAPABILITIES}
    assert len(keys) == len(cases) * len(CAPABILITIES), "two cases of one name"
    return keys


def read_table(operation: str) -> Rows:
    """The committed rows of an operation."""
    table = json.loads(TABLE.read_text())
    version, rows = table["triton"], table[operation]
    return {
        (name, int(sm.removeprefix("sm_"))): {**row, "triton": version}
        for name, by_capability in rows.items()
        for sm, row in by_capability.items()
    }


def _write_table(table: dict[str, Rows]) -> None:
    """One line for each case."""
    lines = [f'  "triton": {json.dumps(triton.__version__)}']
    for operation, rows in sorted(table.items()):
        by_case: dict[str, dict[str, Row]] = {}
        for (name, sm), row in sorted(rows.items()):
            kept = {field: row[field] for field in ("registers", "shared_bytes", "warps", "key")}
            by_case.setdefault(name, {})[f"sm_{sm}"] = kept
        entries = [f"    {json.dumps(name)}: {json.dumps(of)}" for name, of in by_case.items()]
        lines.append(f"  {json.dumps(operation)}: {{\n" + ",\n".join(entries) + "\n  }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def find_or_compile(operation: str, keys: dict[tuple[str, int], str]) -> Rows:
    """Rows from the cache; what it lacks is compiled, and put there."""
    rows = {}
    for place, key in keys.items():
        path = CACHE / f"{key}.json"
        if path.exists():
            rows[place] = json.loads(path.read_text())
    missing = {place: key for place, key in keys.items() if place not in rows}
    if missing:
        compiled = compile_for_real(operation, missing)
        CACHE.mkdir(parents=True, exist_ok=True)
        for row in compiled.values():
            with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
                json.dump(row, file)
            os.replace(file.name, CACHE / f"{row['key']}.json")
        rows |= compiled
    return rows


def compile_for_real(operation: str, keys: dict[tuple[str, int], str]) -> Rows:
    """Compiles cases of an operation, each GPU in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # ptxas has to run for its log, also where two cases come to the same code.
    variables |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    root = str(Path(__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))

    def compile_for(capability: int) -> Rows:
        names = [name for name, sm in keys if sm == capability]
        if not names:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, str(_COMPILE), operation, str(capability)],
                input=json.dumps(names),
                capture_output=True,
                text=True,
                env={**variables, "TRITON_CACHE_DIR": folder},
            )
        assert done.returncode == 0, done.stderr
        rows = _parse(done.stdout)
        assert len(rows) == len(names), f"{len(rows)} of {len(names)} cases were compiled"
        return {
            (row.pop("case"), capability): {**row, "key": keys[name, capability]}
            for name, row in zip(names, rows, strict=True)
        }

    with ThreadPoolExecutor() as pool:
        of_all = list(pool.map(compile_for, CAPABILITIES))
    return {place: row for rows in of_all for place, row in rows.items()}


def _parse(output: str) -> list[Row]:
    """The JSON lines, each with what ptxas said before it."""
    rows: list[Row] = []
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


def main(operations: Operations, arguments: list[str]) -> None:
    """The command line of compile_ahead.py."""
    parser = argparse.ArgumentParser(description="Writes the table of registers anew.")
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args(arguments)
    table = {}
    for operation, cases in operations.items():
        table[operation] = find_or_compile(operation, all_keys(cases()))
        spilling = [place for place, row in table[operation].items() if row["spills"]]
        if spilling:
            raise SystemExit(f"{operation} spills: {spilling}")
        print(f"{operation}: {len(table[operation])} kernels")
    _write_table(table)
