"""The budget of a step: every nanosecond goes to one group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.step import budget
from bench.step.budget import GROUPS, Event

_BACKWARD_OF = "autograd::engine::evaluate_function: "


@pytest.mark.parametrize(
    ("group", "ops"),
    [
        ("conv1x1", "aten::mm < aten::matmul < aten::linear maps"),
        ("conv1x1", "aten::mm < MmBackward0 < " + _BACKWARD_OF + "MmBackward0"),
        ("conv1x1", "aten::cudnn_convolution maps < aten::convolution 1x1 < aten::conv2d maps"),
        ("conv1x1", "aten::addmm_ maps < _ProductBackward"),
        ("conv1x1", "rsfast::subsample_bwd"),
        ("conv_kxk", "aten::cudnn_convolution maps < rsfast::conv2d_fwd"),
        ("conv_kxk", "aten::copy_ maps < rsfast::conv2d_bwd"),
        ("conv_kxk", "aten::convolution_backward kxk < ConvolutionBackward0"),
        ("conv_kxk", "aten::add_ kxk < " + _BACKWARD_OF + "ConvolutionBackward0"),
        ("batch_norm", "rsfast::switchable_bn_act_bwd"),
        ("batch_norm", "rsfast::bn_act_max_pool_fwd"),
        ("batch_norm", "aten::cudnn_batch_norm maps < aten::batch_norm maps"),
        ("batch_norm", "aten::native_batch_norm_backward maps < NativeBatchNormBackward0"),
        ("batch_norm", "aten::threshold_backward maps < ReluBackward0 maps"),
        ("batch_norm", "aten::add maps"),
        ("batch_norm", "aten::add_ maps < " + _BACKWARD_OF + "MmBackward0"),
        ("pool", "rsfast::global_avg_pool_fwd"),
        ("pool", "aten::max_pool2d_with_indices_backward maps"),
        ("pool", "aten::div < MeanBackward1"),
        ("loss", "rsfast::distillation_loss_fwd_bwd"),
        ("loss", "aten::_log_softmax < aten::log_softmax"),
        ("loss", "aten::mul < aten::kl_div"),
        ("optimizer", "aten::_fused_sgd_ < Optimizer.step#SGD.step"),
        ("optimizer", "aten::copy_ < Optimizer.step#SGD.step"),
        ("all_reduce", "c10d::allreduce_ < rsfast::switchable_bn_act_stats"),
        ("copies", "aten::copy_ < aten::_to_copy < aten::to"),
        ("copies", "aten::cat"),
        ("other", "aten::where"),
    ],
)
def test_operations_around_a_kernel_decide_before_its_name(group: str, ops: str) -> None:
    chain = tuple(ops.split(" < "))
    assert budget.group_of("unheard_of_kernel", chain) == group
    if group != "other":  # for which the name is all there is
        assert budget.group_of("ncclDevKernel_AllReduce", chain) == group


@pytest.mark.parametrize(
    ("group", "kernel"),
    [
        ("conv1x1", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"),
        ("conv1x1", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>"),
        ("conv1x1", "triton_tem_fused_mm_7"),
        ("conv1x1", "_subsample_fwd_kernel"),
        ("conv_kxk", "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc"),
        ("conv_kxk", "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized>"),
        ("conv_kxk", "ampere_scudnn_128x64_relu_interior_nn_v1"),
        ("batch_norm", "_bn_bwd_reduce_kernel"),
        ("batch_norm", "_bn_act_max_pool_bwd_kernel"),
        ("batch_norm", "_bn_finalize_kernel"),
        ("batch_norm", "void at::native::batch_norm_transform_input_channels_last_kernel<float>"),
        ("batch_norm", "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512>"),
        ("batch_norm", "triton_red_fused__native_batch_norm_legit_functional_add_relu_3"),
        ("batch_norm", "elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>"),
        ("pool", "_global_avg_pool_bwd_kernel"),
        ("pool", "void at::native::(anonymous namespace)::max_pool_forward_nhwc<float>"),
        ("loss", "_distillation_loss_kernel"),
        ("loss", "void (anonymous namespace)::softmax_warp_forward<float>"),
        ("optimizer", "multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<2>, FusedSgd>"),
        ("all_reduce", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"),
        ("copies", "Memcpy DtoD (Device -> Device)"),
        ("copies", "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>"),
        ("copies", "triton_poi_fused__to_copy_4"),
        ("other", "Memset (Device)"),
    ],
)
def test_kernels_of_a_graph_go_by_their_names(group: str, kernel: str) -> None:
    assert budget.group_of(kernel, ()) == group
    assert budget.group_of(kernel, ("CompiledFunction",)) == group


def test_every_group_has_a_rule_but_the_rest() -> None:
    assert {group for group, _ in budget.RULES} | {"other", "idle"} == set(GROUPS)


_SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=8)


@given(_SPANS)
def test_shares_are_those_of_a_count_over_ticks(spans: list[tuple[int, int]]) -> None:
    expected = [0.0] * len(spans)
    ticks = [
        [i for i, (start, duration) in enumerate(spans) if start <= tick < start + duration]
        for tick in range(50)
    ]
    for running in ticks:
        for index in running:
            expected[index] += 1 / len(running)
    found = budget.shares([Event("kernel", (), *span) for span in spans])
    assert found == pytest.approx(expected)
    assert sum(found) == pytest.approx(sum(1 for running in ticks if running))


@given(_SPANS)
def test_groups_and_idle_add_up_to_the_wall_clock(spans: list[tuple[int, int]]) -> None:
    names = ["nvjet", "_bn_apply_kernel", "unheard_of_kernel"]
    events = [Event(names[i % 3], (), *span) for i, span in enumerate(spans)]
    spent = budget.spend(events, 5, 25)
    ticks = {t for start, duration in spans for t in range(start, start + duration)}
    assert spent["idle"][""] == pytest.approx(20 - len(ticks & set(range(5, 25))))
    assert sum(sum(part.values()) for part in spent.values()) == pytest.approx(20)


def test_streams_that_overlap_share_the_time_and_others_are_named() -> None:
    events = [
        Event("_bn_apply_kernel", (), 0, 10),
        Event("ncclDevKernel_AllReduce", (), 6, 8),
        Event("unheard_of_kernel", ("aten::where",), 20, 5),
    ]
    spent = budget.spend(events, 0, 30)
    assert spent["batch_norm"] == {"_bn_apply_kernel": 8.0}
    assert spent["all_reduce"] == {"ncclDevKernel_AllReduce": 6.0}
    assert spent["other"] == {"unheard_of_kernel < aten::where": 5.0}
    assert spent["idle"] == {"": 11.0}


class _Call:
    """As the profiler's: times in nanoseconds."""

    def __init__(
        self, kind: str, name: str, start: int, end: int, *, number: int = 0, **more: Any
    ) -> None:
        self.activity_type = lambda: kind
        self.name = lambda: name
        self.start_ns = lambda: start
        self.end_ns = lambda: end
        self.duration_ns = lambda: end - start
        self.correlation_id = lambda: number
        self.linked_correlation_id = lambda: more.get("launcher", 0)
        self.start_thread_id = lambda: more.get("thread", 1)
        self.shapes = lambda: more.get("shapes", [])


_WEIGHT, _MAPS = [64, 32, 1, 1], [8, 32, 7, 7]
_CALLS = [
    _Call("user_annotation", "range", 0, 100, number=1),
    _Call("cpu_op", "aten::convolution", 10, 50, number=2, shapes=[_MAPS, _WEIGHT, []]),
    _Call("cpu_op", "aten::cudnn_convolution", 20, 40, number=3, shapes=[_MAPS, _WEIGHT]),
    _Call("cpu_op", "aten::add_", 12, 18, number=4, thread=2, shapes=[_MAPS, _MAPS]),
    _Call("cuda_runtime", "cudaLaunchKernel", 22, 24, number=900, launcher=3),
    _Call("kernel", "xmma", 200, 230, number=900, launcher=3),
    _Call("kernel", "elementwise_kernel", 230, 240, number=901, launcher=4),
    _Call("gpu_memcpy", "Memcpy HtoD", 240, 245, number=902),
    _Call("gpu_user_annotation", "range", 200, 245, number=1),
]


def test_kernels_are_found_with_the_operations_that_launched_them() -> None:
    assert budget.read(_CALLS, 8, on_gpu=True) == [
        Event(
            "xmma",
            ("aten::cudnn_convolution maps", "aten::convolution 1x1", "range"),
            200,
            30,
        ),
        Event("elementwise_kernel", ("aten::add_ maps",), 230, 10),
        Event("Memcpy HtoD", (), 240, 5),
    ]


def test_operations_of_a_cpu_count_without_those_that_they_call() -> None:
    outer = ("aten::convolution 1x1", "range")
    inner = ("aten::cudnn_convolution maps", *outer)
    assert budget.read(_CALLS, 8, on_gpu=False) == [
        Event(outer[0], outer, 10, 10),
        Event(inner[0], inner, 20, 20),
        Event(outer[0], outer, 40, 10),
        Event("aten::add_ maps", ("aten::add_ maps",), 12, 6),
    ]


def test_gap_is_from_the_higher_floor_to_the_step_without_the_profiler() -> None:
    columns = {
        "slow": {**dict.fromkeys(GROUPS, 10.0), "step": 90.0},
        "fast": {
            **dict.fromkeys(GROUPS, 5.0),
            "step": 45.0,
            "floor of arithmetic": 20.0,
            "floor of bytes": 30.0,
        },
    }
    lines = budget.table(columns).splitlines()
    assert lines[0] == "| group | slow | fast |"
    assert "| idle | 10.0 (10.0%) | 5.0 (10.0%) |" in lines
    assert "| step, profiled | 100.0 | 50.0 |" in lines
    assert lines[-1] == "| gap |  | 15.0 |"
    assert not any("gap" in line for line in budget.table({"slow": columns["slow"]}).splitlines())


@pytest.mark.slow
def test_the_command_writes_a_table_whose_groups_add_up(tmp_path: Path) -> None:
    flags = "--arch resnet18 --batch 2 --resolutions 64 48 --rounds 1 --steps 2 --precision fp32"
    impls = ["--impls", "authors_fp32", "rsfast_eager"]
    assert budget.main([*flags.split(), *impls, "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    names = json.loads((tmp_path / "names.json").read_text())
    readme = (tmp_path / "README.md").read_text()
    assert f"| group | {' | '.join(names)} |" in readme
    assert "Largest of other" in readme
    for impl, parts in names.items():
        for group in GROUPS:
            row = rows[f"budget/resnet18/fp32/b2/{impl}/{group}"]
            assert row["unit"] == "us/image"
            assert row["value"] == pytest.approx(sum(parts[group].values()))
        assert all(parts[group] for group in ("conv1x1", "conv_kxk", "batch_norm", "pool", "loss"))
        assert parts["optimizer"]
        assert rows[f"budget/resnet18/fp32/b2/{impl}/step"]["value"] > 0
