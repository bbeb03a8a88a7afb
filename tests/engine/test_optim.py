"""Learning rate, parameter groups, and batch-norm banks that took no part."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from rsfast import create_model
from rsfast.engine.optim import build_optimizer, lr_at, set_lr
from rsfast.losses import MultiResolutionDistillation
from rsfast.models.parts import decoder_of

RESOLUTIONS = (64, 48, 32)


def test_cosine_starts_at_the_rate_and_never_reaches_zero() -> None:
    rates = [lr_at(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[50] == pytest.approx(0.05)
    assert rates[99] == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.99)))
    assert rates[99] > 0
    assert rates == sorted(rates, reverse=True)


def test_warm_up_is_linear_and_the_cosine_spans_the_rest() -> None:
    rates = [lr_at(step, 100, 0.1, warmup_steps=20) for step in range(100)]
    assert rates[:20] == pytest.approx([0.1 * step / 20 for step in range(20)])
    assert rates[20] == 0.1
    assert rates[60] == pytest.approx(0.05)


def test_a_rate_in_steps_falls_at_the_first_step_after_each_milestone() -> None:
    shape = {"schedule": "step", "milestones": (30, 60, 85, 95, 105)}
    rates = [lr_at(step, 120, 0.1, **shape) for step in range(120)]
    for first, last, power in (
        *((0, 29, -1), (30, 59, -2), (60, 84, -3)),
        *((85, 94, -4), (95, 104, -5), (105, 119, -6)),
    ):
        assert rates[first] == rates[last] == pytest.approx(10.0**power)
    halved = [lr_at(step, 120, 0.1, gamma=0.5, **shape) for step in range(120)]
    assert halved[119] == pytest.approx(0.1 / 2**5)


def test_a_rate_in_steps_is_warmed_up_to_what_the_milestones_say() -> None:
    shape = {"schedule": "step", "milestones": (10, 40)}
    rates = [lr_at(step, 100, 0.1, warmup_steps=20, **shape) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step / 20 for step in range(10)])
    assert rates[10:20] == pytest.approx([0.01 * step / 20 for step in range(10, 20)])
    assert rates[20:40] == pytest.approx([0.01] * 20)
    assert rates[40:] == pytest.approx([0.001] * 60)


def test_a_power_law_falls_to_zero_after_the_warm_up() -> None:
    rates = [lr_at(step, 100, 0.1, warmup_steps=20, schedule="poly") for step in range(100)]
    assert rates[:20] == pytest.approx([0.1 * step / 20 for step in range(20)])
    assert rates[20] == 0.1
    assert rates[60] == pytest.approx(0.1 * 0.5**0.9)
    assert rates[99] == pytest.approx(0.1 * (1 / 80) ** 0.9)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule must be one of .*, got 'linear'"):
        lr_at(0, 10, 0.1, schedule="linear")


def test_a_tensor_rate_keeps_its_memory() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    set_lr(optimizer, 0.025)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.025)


def test_everything_is_decayed_as_in_the_paper_unless_told_otherwise() -> None:
    model, loss = create_model("resnet18", RESOLUTIONS, 7), MultiResolutionDistillation(3)
    everything = sum(p.numel() for p in (*model.parameters(), *loss.parameters()))
    (group,) = build_optimizer(model, loss, lr=0.1).param_groups
    assert sum(p.numel() for p in group["params"]) == everything
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)

    decayed, free = build_optimizer(model, loss, lr=0.1, decay="weights").param_groups
    weights = [p for p in model.parameters() if p.dim() == 4] + [model.network.fc.weight]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in weights}
    assert free["weight_decay"] == 0.0
    assert any(p is loss.alpha for p in free["params"])


def test_sets_that_took_no_part_stay_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, loss = create_model("resnet18", RESOLUTIONS, 7).train(), MultiResolutionDistillation(3)
    optimizer = build_optimizer(model, loss, lr=0.1, weight_decay=0.1)
    images = [torch.randn(4, 3, r, r) for r in RESOLUTIONS]
    labels = torch.tensor([0, 1, 2, 3])

    def step(levels: list[int], criterion: MultiResolutionDistillation) -> None:
        optimizer.zero_grad()
        criterion(model([images[level] for level in levels]), labels).total.backward()
        optimizer.step()

    def state() -> list[torch.Tensor]:
        found = []
        for norm in model.batch_norms():
            for param in norm.parameters():
                found.append(param.detach().clone())
                momentum = optimizer.state[param].get("momentum_buffer")
                found.append(torch.zeros_like(param) if momentum is None else momentum.clone())
        return found

    for levels, idle, used in (([1], [0, 2], [1]), ([0, 1, 2], [], [0, 1, 2]), ([0], [1, 2], [0])):
        before = state()
        step(levels, MultiResolutionDistillation(len(levels)))
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old[idle], new[idle])
            assert not torch.equal(old[used], new[used])


def test_apex_is_refused_in_words_where_it_is_absent_or_another_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, loss = create_model("resnet18", (32,), 2), MultiResolutionDistillation(1)
    for present in ({"apex": None}, {"apex": types.ModuleType("apex"), "amp_C": None}):
        for name, module in present.items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(ImportError, match="the apex of PyPI is another package"):
            build_optimizer(model, loss, lr=0.1, kind="apex_sgd")


def test_apex_gets_the_same_groups_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedSGD(torch.optim.SGD):
        """Stands in for Apex's, whose arguments it takes."""

    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedSGD = FusedSGD
    for name, module in (
        ("apex", apex),
        ("apex.optimizers", optimizers),
        ("amp_C", types.ModuleType("amp_C")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    model, loss = create_model("resnet18", (32,), 2), MultiResolutionDistillation(1)
    ours, theirs = (
        build_optimizer(model, loss, lr=0.1, decay="weights", nesterov=True, kind=kind)
        for kind in ("sgd", "apex_sgd")
    )
    assert type(theirs) is FusedSGD
    for group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        for name in ("params", "lr", "momentum", "weight_decay", "nesterov"):
            assert group[name] == their_group[name] or name == "params"
        assert all(a is b for a, b in zip(group["params"], their_group["params"], strict=True))


def test_momentum_starts_at_zero_and_is_nothing_without_momentum() -> None:
    model, loss = create_model("resnet18", (32,), 2), MultiResolutionDistillation(1)
    optimizer = build_optimizer(model, loss, lr=0.1)
    params = [*model.parameters(), *loss.parameters()]
    for param in params:
        buffer = optimizer.state[param]["momentum_buffer"]
        assert not buffer.any()
        assert buffer.stride() == param.stride()
    assert not build_optimizer(model, loss, lr=0.1, momentum=0.0).state


def test_bad_kind_is_named() -> None:
    model, loss = create_model("resnet18", (32,), 2), MultiResolutionDistillation(1)
    with pytest.raises(ValueError, match="kind must be one of"):
        build_optimizer(model, loss, lr=0.1, kind="adam")


def test_bad_decay_mode_is_named() -> None:
    with pytest.raises(ValueError, match="decay must be one of"):
        build_optimizer(
            create_model("resnet18", (32,), 2),
            MultiResolutionDistillation(1),
            lr=0.1,
            decay="biases",
        )


def make_maps() -> tuple[torch.nn.Module, MultiResolutionDistillation, set[int]]:
    torch.manual_seed(0)
    model = create_model("refinenet18", (32,), 2)
    return model, MultiResolutionDistillation(1), decoder_of(model)


def test_a_decoder_has_a_rate_of_its_own_also_where_the_rate_is_a_tensor() -> None:
    model, loss, decoder = make_maps()
    optimizer = build_optimizer(
        model, loss, lr=0.1, decay="weights", decoder=decoder, decoder_lr=10.0
    )
    inside = [all(id(p) in decoder for p in group["params"]) for group in optimizer.param_groups]
    assert inside == [False, False, True, True]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0, 1e-4, 0.0]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.1, 1.0, 1.0])
    held = [torch.tensor(0.0) for _ in rates]
    for group, rate in zip(optimizer.param_groups, held, strict=True):
        group["lr"] = rate
    set_lr(optimizer, 0.02)
    assert all(
        group["lr"] is rate for group, rate in zip(optimizer.param_groups, held, strict=True)
    )
    assert [rate.item() for rate in held] == pytest.approx([0.02, 0.02, 0.2, 0.2])
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len([*model.parameters(), *loss.parameters()]), "each is in one group"


def test_a_state_that_is_loaded_keeps_the_factor() -> None:
    model, loss, decoder = make_maps()
    settings = {"lr": 0.1, "decoder": decoder, "decoder_lr": 10.0}
    state = build_optimizer(model, loss, **settings).state_dict()
    other = build_optimizer(model, loss, **settings)
    other.load_state_dict(state)
    set_lr(other, 0.03)
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.03, 0.3])
