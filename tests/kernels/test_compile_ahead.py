"""Every configuration of every Triton kernel compiles for the GPUs we support, without spills.

Needs no GPU. Only the slow tests compile what tests/kernels/registers.json knows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="needs Triton")

import triton

import kernel_cases
import register_table
from bench.models.instructions import programs_that_fit
from register_table import all_keys, compile_for_real, find_or_compile, read_table

NUM_CASES = {
    "bn_act_max_pool": 26,
    "distillation_loss": 229,
    "global_avg_pool": 20,
    "lq_activation": 70,
    "normalize": 6,
    "subsample": 18,
    "switchable_bn_act": 182,
}
WRITE = "run python tests/kernels/compile_ahead.py --write"


@pytest.fixture(scope="module")
def ahead() -> ModuleType:
    path = Path(__file__).with_name("compile_ahead.py")
    spec = importlib.util.spec_from_file_location("compile_ahead", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NUM_CASES)
def operation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def keys(operation: str, ahead: ModuleType) -> dict[tuple[str, int], str]:
    return all_keys(ahead.OPERATIONS[operation]())


def is_of_this_triton(operation: str) -> bool:
    """Whether the table is: with another one every key differs, and so may the registers."""
    return all(row["triton"] == triton.__version__ for row in read_table(operation).values())


def test_every_configuration_is_in_the_table_of_registers(
    operation: str, keys: dict[tuple[str, int], str]
) -> None:
    table = read_table(operation)
    assert len(keys) == 2 * NUM_CASES[operation]
    assert table.keys() == keys.keys(), WRITE
    if is_of_this_triton(operation):
        stale = [place for place, key in keys.items() if table[place]["key"] != key]
        assert stale == [], WRITE
    else:  # what this Triton makes of them is not known yet
        rows = find_or_compile(operation, keys)
        assert [place for place, row in rows.items() if row["spills"]] == []


@pytest.mark.slow
def test_kernels_compile_without_spills(operation: str, keys: dict[tuple[str, int], str]) -> None:
    rows, table = compile_for_real(operation, keys), read_table(operation)
    assert rows.keys() == keys.keys()
    assert [place for place, row in rows.items() if row["spills"]] == []
    if is_of_this_triton(operation):
        fields = ("registers", "shared_bytes", "warps")
        differing = {
            place: (row, table[place])
            for place, row in rows.items()
            if any(row[field] != table[place][field] for field in fields)
        }
        assert differing == {}, WRITE


def test_all_programs_of_one_wave_fit_at_a_time(ahead: ModuleType) -> None:
    for operation in ("switchable_bn_act", "bn_act_max_pool", "distillation_loss"):
        table = read_table(operation)
        streaming = [case for case in ahead.OPERATIONS[operation]() if case.programs]
        assert len(streaming) >= 26
        for case in streaming:
            row = table[case.name, 90]
            fitting = programs_that_fit(row["registers"], row["shared_bytes"], row["warps"])
            assert fitting >= case.programs, case.name


def test_tiles_are_loaded_ahead_and_nothing_else_takes_shared_memory(ahead: ModuleType) -> None:
    bytes_of = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
    table, checked = read_table("switchable_bn_act"), 0
    for case in ahead.OPERATIONS["switchable_bn_act"]():
        if not case.programs or case.constants["C"] % 8:  # too narrow for asynchronous copies
            continue
        names = [name for name in ("x_ptr", "dy_ptr", "residual_ptr") if name in case.types]
        sizes = [bytes_of[case.types[name]] for name in names]
        if "mask_ptr" in case.types and max(sizes) > 2:
            continue  # two threads share a byte of the mask; in 16 bits one thread has all of it
        # Two tiles of each tensor that is read.
        tile = case.constants["BLOCK_M"] * case.constants["BLOCK_C"]
        for capability in (80, 90):
            assert table[case.name, capability]["shared_bytes"] == 2 * tile * sum(sizes), case.name
        checked += 1
    assert checked >= 100


def test_a_key_follows_source_types_constants_options_and_gpu(ahead: ModuleType) -> None:
    case = next(ahead.OPERATIONS["bn_act_max_pool"]())
    changes = [
        {"types": case.types | {"x_ptr": "*fp16"}},
        {"constants": case.constants | {"C": 7}},
        {"options": case.options | {"num_warps": 2}},
        {"kernel": kernel_cases.bn_forward._bn_apply_kernel},
    ]
    keys = [
        register_table.key_of(other, 90) for other in (case, *(case._replace(**c) for c in changes))
    ]
    keys.append(register_table.key_of(case, 80))
    assert len(set(keys)) == len(keys)


def test_a_key_follows_the_functions_that_a_kernel_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = kernel_cases.bn_forward._bn_apply_kernel.fn
    source = register_table._source.__wrapped__
    before = source(kernel)
    assert "def\nactivate" in before
    assert "def\n_sigmoid" in before  # which that calls
    assert "the statistics read those last" not in before.replace("\n", " ")  # a comment
    monkeypatch.setitem(kernel.__globals__, "activate", kernel_cases.bn_tiles.keeps_gradient)
    assert source(kernel) != before
