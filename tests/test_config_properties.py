"""Malformed command lines and config files, made by the hundred: each ends in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import tempfile
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from rsfast.config import TrainConfig, parse_args, rules_of
from rsfast.models import ARCHITECTURES

SETTINGS = settings(max_examples=250, derandomize=True, deadline=None, database=None)
NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))
RULES = rules_of(TrainConfig)
WITH_CHOICES = (
    "bn distill crop flip levels val_crop exif normalize loader precision decay device kernels "
    "optimizer schedule"
)
CHOICES = {name: RULES[name].choices or () for name in WITH_CHOICES.split()}
# What a plain test would choose to put around the one bad thing.
GOOD: dict[str, Any] = {"epochs": 3, "lr": 0.5, "nesterov": True, "val_crop": "none", "data": "x"}


def kind_of(name: str) -> Any:
    """The type of a setting, without None."""
    kind = typing.get_type_hints(TrainConfig)[name]
    return typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


OF_KIND = {
    kind: tuple(name for name in NAMES if kind_of(name) is kind) for kind in (int, float, bool, str)
}
TUPLES = ("resolutions", "crop_area", "milestones")
AT_LEAST_ONE = ("batch_size", "epochs", "log_every", "max_skipped", "keep")
NOT_NEGATIVE = (
    *("steps_per_epoch", "workers", "seed", "lr", "weight_decay", "warmup_epochs"),
    *("mixup", "cutmix", "lighting"),
)
PROBABILITIES = ("random_erasing",)
SHARES = ("label_smoothing", "ema_decay", "momentum", "gamma")

words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1)
no_ints = words.filter(lambda text: not is_number(text, int) and text[0] != "-")
no_floats = words.filter(lambda text: not is_number(text, float) and text[0] != "-")
broken_floats = st.sampled_from([math.nan, math.inf, -math.inf])
negative_ints = st.integers(max_value=-1)
negative_floats = st.floats(max_value=0.0, exclude_max=True)
beyond_shares = st.one_of(negative_floats, st.floats(min_value=1.0), broken_floats)


def is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def profile_like(text: str) -> bool:
    first, _, last = text.partition(":")
    return first.isdecimal() and last.isdecimal() and int(first) < int(last)


def arch_like(text: str) -> bool:
    """Whether it names a network, or could name somebody's function."""
    module, colon, function = text.partition(":")
    own = bool(colon) and module.replace(".", "_").isidentifier() and function.isidentifier()
    return text in ARCHITECTURES or text.startswith(("torchvision/", "timm/")) or own


def climbing(numbers: list[int]) -> bool:
    """Whether they are no resolutions."""
    descending = all(a > b for a, b in itertools.pairwise(numbers))
    return not (numbers and descending and numbers[-1] > 0)


bad_resolutions = st.lists(st.integers(-300, 300), min_size=1, max_size=6).filter(climbing)
bad_areas = st.one_of(
    st.lists(st.floats(0.01, 1.0), max_size=4).filter(lambda area: len(area) not in (0, 2)),
    st.tuples(st.floats(0.51, 1.0), st.floats(0.01, 0.5)).map(list),
    st.tuples(st.floats(max_value=0.0), st.floats(0.01, 1.0)).map(list),
    st.tuples(st.floats(0.01, 1.0), st.floats(min_value=1.01)).map(list),
    st.tuples(broken_floats, st.floats(0.01, 1.0)).map(list),
    st.tuples(st.floats(0.01, 1.0), broken_floats).map(list),
)
bad_intervals = st.one_of(
    words.filter(lambda text: not text.removesuffix("m").isdecimal()),
    st.sampled_from(["0", "0m", "m", "10 m", "-5", "1.5", "5s", "٣"]),
)
unknown_names = words.filter(lambda text: text not in NAMES and text not in ("config", "help"))


def pairs(names: typing.Iterable[str], values: st.SearchStrategy) -> st.SearchStrategy:
    """(name, value) of one of the settings."""
    return st.tuples(st.sampled_from(sorted(names)), values)


# (name, value) of which a command line and a file can be made alike.
bad_values = st.one_of(
    pairs(set(AT_LEAST_ONE) & set(OF_KIND[int]), st.integers(max_value=0)),
    pairs(set(NOT_NEGATIVE) & set(OF_KIND[int]), negative_ints),
    pairs(set(NOT_NEGATIVE) & set(OF_KIND[float]), negative_floats),
    pairs(SHARES, beyond_shares),
    pairs(PROBABILITIES, st.one_of(negative_floats, st.floats(min_value=1.01), broken_floats)),
    pairs(["rand_augment"], words.filter(lambda text: not profile_like(text.replace(":", ":9")))),
    pairs(["resolutions"], bad_resolutions),
    pairs(["crop_area"], bad_areas),
    pairs(["milestones"], st.lists(st.integers(-300, 300), min_size=1, max_size=6)),
    pairs(["profile"], words.filter(lambda text: not profile_like(text))),
    pairs(["checkpoint_every"], bad_intervals),
    *(
        pairs([name], words.filter(lambda text, known=known: text not in known))
        for name, known in CHOICES.items()
        if name != "distill"
    ),
    pairs(["distill"], words.filter(lambda text: text not in (*CHOICES["distill"], "ens"))),
    pairs(["arch"], words.filter(lambda text: not arch_like(text))),
    pairs(["warmup_epochs"], st.floats(min_value=1000.0)),
    pairs(["restart_epoch"], st.just(True)),
    pairs(["momentum"], st.just(0.0)),  # with the Nesterov momentum of GOOD
    pairs(["optimizer"], st.just("apex_sgd")),  # goes with no graph
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_flags(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    return [f"{flag(name)}={value}"]  # a value may begin with a dash


def refusal(argv: list[str]) -> str:
    """The sentence with which the command line is refused."""
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen), pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    assert stopped.value.code == 2
    text = screen.getvalue()
    before, _, sentence = text.rpartition("rsfast.train: error: ")
    assert before == ""
    assert "Traceback" not in text
    assert sentence.endswith("\n")
    assert len(sentence.splitlines()) == 1
    assert len(sentence.strip()) > 10
    return sentence


def refusal_of_file(content: bytes) -> str:
    """The sentence with which a config file of these bytes is refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bad.toml"
        file.write_bytes(content)
        return refusal(["--config", str(file)])


def lines_of_good(but: str) -> list[str]:
    good = {name: value for name, value in GOOD.items() if name != but}
    return [part for name, value in good.items() for part in as_flags(name, value)]


@SETTINGS
@given(bad_values, st.booleans())
def test_a_value_out_of_range_is_refused_on_the_command_line(
    bad: tuple[str, Any], at_the_end: bool
) -> None:
    good, flags = lines_of_good(bad[0]), as_flags(*bad)
    sentence = refusal([*good, *flags] if at_the_end else [*flags, *good])
    if not any(part.startswith("-") for part in flags[1:]):  # which argparse takes for flags
        assert bad[0].replace("_", " ") in sentence.replace("_", " ").replace("-", " ")


malformed = st.one_of(
    pairs(OF_KIND[int], no_ints).map(lambda pair: as_flags(*pair)),
    pairs(OF_KIND[float], no_floats).map(lambda pair: as_flags(*pair)),
    st.tuples(st.integers(1, 400), no_ints).map(lambda two: ["--resolutions", *map(str, two)]),
    st.tuples(st.floats(0, 1), no_floats).map(lambda two: ["--crop-area", *map(str, two)]),
    pairs(OF_KIND[bool], words).map(lambda pair: as_flags(*pair)),
    pairs({*NAMES, "config"} - {*OF_KIND[bool], "milestones"}, st.none()).map(
        lambda pair: [flag(pair[0])]
    ),
    pairs([*OF_KIND[int], *OF_KIND[float], "profile"], st.just("")).map(
        lambda pair: as_flags(*pair)
    ),
    unknown_names.map(lambda name: [f"--{name}"]),
    st.tuples(unknown_names, words).map(lambda two: [f"--{two[0]}", two[1]]),
    no_ints.filter(lambda text: text[0] != "-").map(lambda text: ["--epochs", "3", text]),
    words.map(lambda text: ["--config", f"/nowhere/{text}.toml"]),
    st.sampled_from([["--config", "/"], ["--config", "/dev/null/x"], ["-x"], ["--epo", "3"]]),
)


@SETTINGS
@given(malformed)
def test_a_malformed_command_line_is_refused(argv: list[str]) -> None:
    # A good part behind the bad one might be its value, or take its place.
    refusal([*lines_of_good(""), *argv])


@SETTINGS
@given(bad_values)
def test_a_value_out_of_range_is_refused_in_a_file(bad: tuple[str, Any]) -> None:
    sentence = refusal_of_file(tomli_w.dumps({**GOOD, bad[0]: bad[1]}).encode())
    assert bad[0] in sentence


values = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.text(st.characters(codec="utf-8", exclude_characters="\r")),
        st.dates(),
        st.times(),
        st.datetimes(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=5,
)


def of_wrong_type(pair: tuple[str, Any]) -> bool:
    name, value = pair
    if name in TUPLES:
        numbers = (int, float) if name == "crop_area" else (int,)
        return not isinstance(value, list) or any(type(part) not in numbers for part in value)
    kind = kind_of(name)
    return type(value) is not kind and not (kind is float and type(value) is int)


@SETTINGS
@given(pairs(NAMES, values).filter(of_wrong_type))
def test_a_value_of_the_wrong_type_is_refused_in_a_file(bad: tuple[str, Any]) -> None:
    sentence = refusal_of_file(tomli_w.dumps({**GOOD, bad[0]: bad[1]}).encode())
    assert f"bad.toml: {bad[0]} must be " in sentence


def is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


WHOLE = tomli_w.dumps({**GOOD, "resolutions": [64, 32], "arch": "resnet18"})
duplicates = st.sampled_from(sorted(GOOD)).map(
    lambda name: WHOLE + tomli_w.dumps({name: GOOD[name]})
)
cuts = st.integers(1, len(WHOLE)).map(lambda at: WHOLE[:-at]).filter(lambda text: not is_toml(text))
insertions = (
    st.tuples(st.integers(0, len(WHOLE)), words)
    .map(lambda two: WHOLE[: two[0]] + two[1] + WHOLE[two[0] :])
    .filter(lambda text: not is_toml(text))
)
texts = words.filter(lambda text: not is_toml(text))
no_text = st.binary(min_size=1).filter(lambda content: not is_text(content))
unknown_keys = st.tuples(unknown_names, values).map(lambda two: tomli_w.dumps({two[0]: two[1]}))


def is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@SETTINGS
@given(
    st.one_of(
        *(part.map(str.encode) for part in (duplicates, cuts, insertions, texts, unknown_keys)),
        no_text,
    )
)
def test_a_file_that_is_no_list_of_settings_is_refused(content: bytes) -> None:
    assert "bad.toml" in refusal_of_file(content)


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--weight-decay", "nan"],
        ["--weight-decay", "inf"],
        ["--warmup-epochs", "nan"],
        ["--config", ""],
        ["--data", ""],
        ["--output", ""],
        ["--resume", ""],
        ["--data", "a\0b"],
        ["--checkpoint-every", f"{'9' * 400}m"],
        ["--checkpoint-every", "9" * 30],
        ["--seed", "9" * 30],
        ["--batch-size", "9" * 30],
        ["--epochs", "9" * 30],
        ["--workers", "9" * 30],
        ["--resolutions", "9" * 30],
        ["--no-such\nflag"],
    ],
    ids=lambda argv: " ".join(argv)[:30].encode("unicode_escape").decode(),
)
def test_nonsense_that_python_can_read_is_refused_on_the_command_line(argv: list[str]) -> None:
    name = argv[0].removeprefix("--").replace("-", " ")
    assert name.split("\n")[0] in refusal(argv).replace("_", " ").replace("-", " ")


@pytest.mark.parametrize(
    "text",
    [
        f"lr = {'9' * 400}",
        f"lr = {'9' * 5000}",
        f"epochs = {'9' * 5000}",
        f"a = {'[' * 5000}",
        f"a = {'{a = ' * 5000}",
        "lr = nan",
        "lr = 1e999",
        "data = ''",
        f"seed = {'9' * 30}",
    ],
    ids=lambda text: text[:12],
)
def test_nonsense_that_toml_can_read_is_refused_in_a_file(text: str) -> None:
    sentence = refusal_of_file(text.encode())
    assert "bad.toml" in sentence or text.split(" ")[0] in sentence
