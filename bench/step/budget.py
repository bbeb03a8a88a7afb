"""Where the time of a training step goes, by group of layers: `python -m bench.step.budget`.

Steps run under PyTorch's profiler. Whatever keeps the device busy belongs to one group, by the
operations that it was launched from, or by its own name where none is recorded: a replayed CUDA
graph has kernels only. Where several kernels run at once, each gets an equal part of that time, so
that the groups and the idle rest add up to the wall clock.

Without a GPU the same is done with operations of the CPU, each without those that it calls; idle
is Python then. To add a rule, add a line to RULES.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.models import roofline
from bench.step import bench_train_step as race
from bench.support.results_file import Results
from bench.support.shapes import ARCHITECTURES
from bench.support.timing import DEVICE, ON_GPU, synchronized_clock, time_steps
from rsfast.engine import PRECISIONS

__all__ = ["GROUPS", "RULES", "Event", "group_of", "main", "read", "shares", "spend"]

GROUPS = (
    *("conv1x1", "conv_kxk", "batch_norm", "pool", "loss", "optimizer"),
    *("all_reduce", "copies", "other", "idle"),
)

# The first that is found in the names of the operations, "innermost < caller < ...", decides; if
# none is, the first that is found in the kernel's own name. Names of operations are followed by
# "maps" if they work on feature maps, "1x1" or "kxk" if on weights of convolutions. A sum of those
# is of their gradients from several levels.
RULES = (
    ("all_reduce", r"nccl|c10d::"),
    ("optimizer", r"Optimizer\.|_fused_sgd|FusedSgd|_foreach_|multi_tensor"),
    ("loss", r"(?i)distillation_loss|soft_?max|nll_?loss|cross_entropy|kl_div|xlogy"),
    ("conv1x1", r"subsample|aten::(convolution\w*|add_?) 1x1"),
    ("conv_kxk", r"rsfast::conv2d|aten::(convolution\w*|add_?) kxk"),
    # cuDNN's and CUTLASS's kernels, whose names may end in relu. In a graph of authors_* they are
    # those of 1x1 convolutions too; rsfast multiplies matrices there.
    ("conv_kxk", r"fprop|dgrad|wgrad|implicit_gemm|convolve|scudnn|winograd|conv_depthwise"),
    ("conv_kxk", r"nchwToNhwc|nhwcToNchw|triton_tem_\w*convolution"),
    # The classifier is here, and products of matrices have no other use.
    ("conv1x1", r"aten::(add)?mm_?\b|nvjet|gemm|gemv|splitK|triton_tem_\w*mm"),
    ("batch_norm", r"switchable_bn|batch_?norm|\b_?bn_"),
    ("pool", r"(?i)avg_pool|max_?pool|aten::mean|MeanBackward|MeanOps"),
    ("batch_norm", r"(?i)relu|threshold|hardtanh|clamp"),
    # The shortcut, and the sum of its gradients.
    ("batch_norm", r"aten::add_? maps|CUDAFunctor_add<c10::(BFloat16|Half)>"),
    ("copies", r"aten::(copy_|_to_copy|cat|clone)\b"),
    ("copies", r"Memcpy|CatArray|copy_kernel|fused__to_copy"),
)

_ABOUT = """\
Microseconds per image and share of the step, medians over rounds, by what the device is busy with;
an image counts once for all its resolutions. batch_norm is with ReLU and shortcut, and on a GPU in
rsfast_* with the stem's pooling; conv1x1 is with the classifier. `idle` is the wall clock while
nothing runs, and longer than without the profiler where the host is what the device waits for:
`step` is without it. Floors are what the measured matrix rate or copy bandwidth alone would allow a
step in 16 bits; `gap` is from the higher one to `step`. Without operations around them, in a graph,
kernels go by their names: cuDNN's to conv_kxk."""

_WINDOW = "bench.step.budget"
_WEIGHT_AT = {"aten::convolution": 1, "aten::convolution_backward": 2}  # among the arguments


class Event(NamedTuple):
    """What kept the device busy: a kernel, or a piece of an operation on a CPU.

    Attributes:
        name: of the kernel or operation.
        ops: operations that it was launched from, innermost first, tagged; empty if unknown.
        start, duration: in nanoseconds.
    """

    name: str
    ops: tuple[str, ...]
    start: int
    duration: int


# Nanoseconds by group and by name in it, that of the kernel and of what launched it.
Spent = dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.step.budget", description=__doc__)
    rival = "authors_compile" if ON_GPU else "authors_fp32"
    default = [rival, *(impl for impl in race.IMPLEMENTATIONS if impl.startswith("rsfast"))]
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    parser.add_argument("--batch", type=int, default=race.BATCH)
    parser.add_argument("--resolutions", nargs="+", type=int, default=race.RESOLUTIONS)
    parser.add_argument("--precision", choices=list(PRECISIONS), default=race.PRECISION)
    parser.add_argument("--impls", nargs="+", choices=race.IMPLEMENTATIONS, default=default)
    parser.add_argument("--rounds", type=int, default=5, help="of each implementation (5)")
    parser.add_argument("--steps", type=int, default=3, help="in a round (3)")
    args = parser.parse_args(argv)
    setting = race.Setting(args.arch, args.batch, args.precision, tuple(args.resolutions))
    torch.backends.cudnn.benchmark = True  # as a run has it
    results = Results(args.output, "budget", DEVICE)
    floors = _floors(setting, results)
    losses: dict[str, float] = {}
    columns: dict[str, dict[str, float]] = {}
    names: dict[str, Spent] = {}
    for impl in args.impls:
        run = race.make_step(setting, impl)
        losses[impl] = float(run())
        race.check_losses(losses)
        walls = time_steps({impl: run}, rounds=args.rounds, steps=args.steps)[impl]
        rounds = _profile(run, args.rounds, args.steps, args.batch)
        unit = 1e-3 / (args.steps * args.batch)  # from nanoseconds of a round to us/image
        samples = {g: [unit * sum(spent[g].values()) for spent in rounds] for g in GROUPS}
        samples["step"] = [1e6 * seconds / args.batch for seconds in walls]
        precision = "fp32" if impl.endswith("fp32") else setting.precision
        for row, values in samples.items():
            name = f"budget/{args.arch}/{precision}/b{args.batch}/{impl}/{row}"
            results.add(name, values, "us/image")
        columns[impl] = {row: statistics.median(values) for row, values in samples.items()}
        columns[impl].update(floors if precision != "fp32" else {})
        names[impl] = _mean(rounds, unit)
        del run  # the next one may need the memory
        gc.collect()
        torch.cuda.empty_cache()
    (results.folder / "names.json").write_text(json.dumps(names, indent=1) + "\n")
    report = [table(columns), "Largest of other, in us/image; all names: names.json.\n"]
    for impl, spent in names.items():
        top = list(spent["other"].items())[:8]
        report += [f"- {impl}: {value:.2f} `{name[:120]}`" for name, value in top]
    print("", *report, sep="\n")
    command = ["bench.step.budget", *(sys.argv[1:] if argv is None else argv)]
    results.finish(command, "\n".join([_ABOUT, "", *report, ""]))
    return 0


def _floors(setting: race.Setting, results: Results) -> dict[str, float]:
    """us/image; none in float32, of which the roofline knows nothing."""
    if setting.precision == "fp32":
        return {}
    copy, rate = roofline.measure_card(results)
    floors = roofline.step_floors(setting.arch, setting.resolutions)
    moved = 1e6 * floors.bytes_16_bit / copy
    return {"floor of arithmetic": 1e6 * floors.flops / rate, "floor of bytes": moved}


def _profile(run: Callable[[], Any], rounds: int, steps: int, batch: int) -> list[Spent]:
    """Of each round of several steps, after one that warms the profiler up."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(rounds + 1):
            synchronized_clock()
            with record_function(_WINDOW):
                for _ in range(steps):
                    run()
                synchronized_clock()
    calls = profiler.profiler.kineto_results.events()
    events = read(calls, batch, on_gpu=ON_GPU)
    ranges = (c for c in calls if c.activity_type() == "user_annotation" and c.name() == _WINDOW)
    windows = sorted((c.start_ns(), c.end_ns()) for c in ranges)
    return [spend(events, *window) for window in windows[1:]]


def _mean(rounds: Sequence[Spent], factor: float) -> Spent:
    """Times `factor`; in every group from the largest on."""
    mean: Spent = {}
    for group in GROUPS:
        names = {name for spent in rounds for name in spent[group]}
        part = {n: factor * statistics.fmean(s[group].get(n, 0.0) for s in rounds) for n in names}
        mean[group] = dict(sorted(part.items(), key=lambda item: -item[1]))
    return mean


def read(calls: Iterable[Any], batch: int, *, on_gpu: bool) -> list[Event]:
    """What kept the device busy, by the profiler's raw events (`_KinetoEvent`s of all kinds).

    `batch`, the number of images, tells feature maps from weights.
    """
    calls = list(calls)
    hosts = [c for c in calls if c.activity_type() in ("cpu_op", "user_annotation")]
    hosts.sort(key=lambda c: (c.start_thread_id(), c.start_ns(), -c.end_ns()))
    launchers: dict[int, tuple[str, ...]] = {}
    pieces: list[Event] = []
    for _, thread in groupby(hosts, key=lambda c: c.start_thread_id()):
        pieces += _walk(thread, batch, launchers)
    if not on_gpu:
        return pieces
    return [
        Event(c.name(), launchers.get(c.linked_correlation_id(), ()), c.start_ns(), c.duration_ns())
        for c in calls
        if c.activity_type() in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def _walk(thread: Iterable[Any], batch: int, launchers: dict[int, tuple[str, ...]]) -> list[Event]:
    """Pieces of operations in which they call none; adds all to `launchers`, by correlation."""
    pieces: list[Event] = []
    stack: list[tuple[int, tuple[str, ...], bool]] = []  # end, chain, whether it is a range only
    clock = 0

    def advance(time: int) -> None:
        nonlocal clock
        while stack:
            end, chain, is_range = stack[-1]
            if min(end, time) > clock and not is_range:
                pieces.append(Event(chain[0], chain, clock, min(end, time) - clock))
            clock = max(clock, min(end, time))
            if end > time:
                break
            stack.pop()
        clock = time

    for call in thread:
        advance(call.start_ns())
        end, callers, _ = stack[-1] if stack else (call.end_ns(), (), False)
        chain = (_tagged(call, batch), *callers)
        launchers[call.correlation_id()] = chain
        stack.append((min(end, call.end_ns()), chain, call.activity_type() == "user_annotation"))
    advance(stack[0][0])
    return pieces


def _tagged(call: Any, batch: int) -> str:
    name, shapes = call.name(), call.shapes()
    index = _WEIGHT_AT.get(name, 0)
    shape = shapes[index] if len(shapes) > index else []
    if len(shape) == 4 and (index or shape[0] != batch):
        return f"{name} {'1x1' if shape[2:] == [1, 1] else 'kxk'}"
    packed = len(shape) == 2 and shape[0] > batch and shape[0] % batch == 0
    return f"{name} maps" if packed or len(shape) == 4 else name


@functools.cache
def group_of(name: str, ops: tuple[str, ...]) -> str:
    """The group that an event of that name and those operations belongs to."""
    for names in (" < ".join(ops), name):
        for group, pattern in RULES:
            if re.search(pattern, names):
                return group
    return "other"


def shares(events: Sequence[Event]) -> list[float]:
    """Nanoseconds of each, in equal parts where several overlap: their sum is the union."""
    ends = [(e.start + e.duration, i) for i, e in enumerate(events)]
    spans, running, last = [0.0] * len(events), set[int](), 0
    for time, index in sorted([(e.start, i) for i, e in enumerate(events)] + ends):
        for other in running:
            spans[other] += (time - last) / len(running)
        running ^= {index}
        last = time
    return spans


def spend(events: Iterable[Event], start: int, stop: int) -> Spent:
    """What happened between two times; groups add up to `stop - start`."""
    cut = ((e, max(e.start, start), min(e.start + e.duration, stop)) for e in events)
    inside = [e._replace(start=a, duration=b - a) for e, a, b in cut if b > a]
    spent: Spent = {group: {} for group in GROUPS}
    for event, share in zip(inside, shares(inside), strict=True):
        part = spent[group_of(event.name, event.ops)]
        name = " < ".join(dict.fromkeys([event.name, *event.ops[:1]]))
        part[name] = part.get(name, 0.0) + share
    busy = sum(ns for part in spent.values() for ns in part.values())
    spent["idle"][""] = stop - start - busy
    return spent


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of implementation -> us/image of each group, "step", and floors if there are."""
    rows: dict[str, list[str]] = {"group": list(columns), "---": ["---"] * len(columns)}
    extra = list(dict.fromkeys(row for c in columns.values() for row in c if row not in GROUPS))
    for group in (*GROUPS, "step, profiled", *extra, "gap"):
        rows[group] = []
        for column in columns.values():
            total = sum(column[g] for g in GROUPS)
            floors = [us for row, us in column.items() if row.startswith("floor")]
            gap = {"gap": column["step"] - max(floors)} if floors else {}
            value = {**column, "step, profiled": total, **gap}.get(group)
            share = f" ({value / total:.1%})" if value is not None and group in GROUPS else ""
            rows[group].append("" if value is None else f"{value:.1f}{share}")
    shown = {row: cells for row, cells in rows.items() if any(cells)}
    return "\n".join(f"| {row} | {' | '.join(cells)} |" for row, cells in shown.items()) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
