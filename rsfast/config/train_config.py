"""The settings of a run: one frozen dataclass, from which recipes and command line follow."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from rsfast.data.loader import BACKENDS, NORMALIZATIONS
from rsfast.data.plan import CROP_MODES, FLIP_MODES, VAL_CROPS
from rsfast.engine import PRECISIONS
from rsfast.engine.optim import DECAY_MODES, OPTIMIZERS
from rsfast.kernels import BACKENDS as KERNEL_BACKENDS
from rsfast.kernels import DISTILL_MODES
from rsfast.models.registry import NETWORKS, check_arch
from rsfast.models.rsnet import BN_MODES
from rsfast.pyramid import check_resolutions

__all__ = [
    "TrainConfig",
    "checkpoint_interval",
    "parse_args",
    "profiled_steps",
    "read_config",
    "recipe_names",
    "shown",
]

_CHOICES: dict[str, Sequence[str]] = {
    "bn": BN_MODES,
    "distill": DISTILL_MODES,
    "crop": CROP_MODES,
    "flip": FLIP_MODES,
    "val_crop": VAL_CROPS,
    "normalize": tuple(NORMALIZATIONS),
    "loader": BACKENDS,
    "precision": tuple(PRECISIONS),
    "decay": DECAY_MODES,
    "device": ("auto", "cpu", "cuda"),
    "kernels": ("auto", *KERNEL_BACKENDS, "cuda"),
    "optimizer": OPTIMIZERS,
}
_LARGEST = 2**31 - 1  # of any count
# The authors' spelling of two options.
_ALIASES = {"resolutions": ("--sizes",), "distill": ("--kd-type",)}
_AUTHORS_KD_TYPES = {"ens_topdown": "full", "ens": "vanilla"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything a training run depends on."""

    arch: str = "resnet50"
    """network, and the recipe that the other settings start from"""
    data: str | None = None
    """folder with train/ and val/, one sub-folder per class; without it the built-in set is used"""
    output: str | None = None
    """run folder; runs/<arch> by default"""
    resolutions: tuple[int, ...] = (224, 192, 160, 128, 96)
    """trained resolutions in pixels, strictly descending"""
    distill: str = "full"
    """which resolutions teach which"""
    bn: str = "private"
    """one batch-norm set per resolution, or one for all"""
    sync_bn: bool = False
    """batch statistics over all ranks, set by set, instead of each rank's own"""
    label_smoothing: float = 0.0
    """of the cross entropies, in [0, 1)"""
    crop: str = "single"
    """one random window per image, or one for each of its levels"""
    copies: int = 1
    """levels of each resolution, which differ in their windows if crop is multi; they share a
    batch-norm set"""
    flip: str = "shared"
    """one random flip per image, one for each of its levels, or none"""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """range of the window's share of the image's area"""
    val_crop: str = "center"
    """resize to r / 0.875 and cut the centre, or resize straight to r"""
    normalize: str = "imagenet"
    """subtract mean and divide by deviation, or feed [0, 1]"""
    batch_size: int = 256
    """images per GPU (per process on CPUs)"""
    epochs: int = 120
    """passes over the data"""
    steps_per_epoch: int = 0
    """cut epochs short after so many steps; 0 for whole ones"""
    lr: float = 0.1
    """highest learning rate; cosine to 0 per step"""
    scale_lr: bool = False
    """multiply lr by (images per step over all ranks) / 256; goes with warmup_epochs"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up"""
    optimizer: str = "sgd"
    """sgd of PyTorch (fused on a GPU), or that of NVIDIA Apex where it is installed"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = 1e-4
    """L2 factor"""
    decay: str = "all"
    """decay all parameters, or only the weights of convolutions and classifier"""
    ema_decay: float = 0.0
    """per-step decay of averaged weights, which are then the ones validated; 0 for none"""
    precision: str | None = None
    """autocast type; by default bf16 on a GPU and fp32 on a CPU"""
    loader: str = "dali"
    """data loader; synthetic repeats one random batch"""
    strict: bool = False
    """refuse a data set with unreadable images instead of leaving them out"""
    workers: int = 2
    """loader threads (dali) or processes (pil) per rank"""
    device: str = "auto"
    """auto takes a GPU where there is one"""
    kernels: str = "auto"
    """batch norm, pooling and loss in fused Triton kernels or in plain PyTorch; auto takes triton
    on a GPU; cuda is triton with batch norm in CUDA C++ (csrc/README.md), for bf16 and fp16, not
    timed yet"""
    graph: bool = True
    """replay the whole step as one CUDA graph; without effect on a CPU"""
    deterministic: bool = False
    """the same bits in every run on the same machine, at some cost in speed"""
    profile: str | None = None
    """steps A:B (from A up to, but not including, B) that a profiler is told to record, and names
    of layers and phases for it"""
    checkpoint_every: str | None = None
    """steps ("500") or minutes ("10m") between checkpoints, besides those after every epoch"""
    keep: int = 2
    """checkpoints to keep: last.pt, last-1.pt, ..."""
    max_skipped: int = 20
    """steps in a row that may be left out because loss or gradients are not finite"""
    seed: int = 0
    """of weights, order and augmentation"""
    log_every: int = 50
    """steps between log lines; the only moments that wait for the device"""
    resume: str | None = None
    """checkpoint to continue, or auto for the run folder's last whole one if it is there"""
    restart_epoch: bool = False
    """continue from the start of the checkpoint's epoch, which allows another number of processes,
    batch size, loader or set of images"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_range(field.name, getattr(self, field.name))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "precision" and value is None):
                raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
        check_arch(self.arch)
        check_resolutions(self.resolutions)
        for name in ("batch_size", "copies", "epochs", "log_every", "max_skipped", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps_per_epoch", "workers", "lr", "weight_decay", "warmup_epochs", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema_decay", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if len(self.crop_area) != 2 or not 0.0 < self.crop_area[0] <= self.crop_area[1] <= 1.0:
            raise ValueError(f"crop_area must be a range within (0, 1], got {self.crop_area}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than the {self.epochs} epochs, "
                f"got {self.warmup_epochs}"
            )
        if self.optimizer == "apex_sgd" and self.graph:
            raise ValueError(
                "optimizer apex_sgd takes its learning rate from the host, which a captured step "
                "cannot: add --no-graph"
            )
        if self.kernels == "cuda" and self.precision == "fp32":
            raise ValueError("kernels cuda needs precision bf16 or fp16, got fp32")
        if self.profile is not None:
            profiled_steps(self.profile)
        checkpoint_interval(self.checkpoint_every)
        if self.restart_epoch and self.resume is None:
            raise ValueError("restart_epoch needs a run to continue: add --resume auto")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0")

    def to_toml(self) -> str:
        """A config file; settings that are None are left out."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return tomli_w.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})


def _check_range(name: str, value: Any) -> None:
    """Refuses what a type allows and no setting means."""
    if isinstance(value, tuple):
        for part in value:
            _check_range(name, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST}, got {_cut(str(value))}")
    elif isinstance(value, str) and (not value or "\0" in value):
        raise ValueError(f"{name} must be text that is not empty, without null, got {value!r}")


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def profiled_steps(text: str) -> tuple[int, int]:
    """The A and B of "A:B".

    Raises:
        ValueError: if the text is something else.
    """
    first, colon, last = text.partition(":")
    if not (colon and _is_count(first) and _is_count(last) and int(first) < int(last)):
        raise ValueError(
            f"profile must look like 100:110, the second above the first, got {_cut(text)!r}"
        )
    return int(first), int(last)


def _is_count(text: str) -> bool:
    """Whether the text is a number from 0 that a step or minute can have."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(_LARGEST))


def checkpoint_interval(text: str | None) -> tuple[int, float]:
    """The steps and seconds of "500" or "10m"; 0 for what it is not.

    Raises:
        ValueError: if the text is something else.
    """
    if text is None:
        return 0, 0.0
    number = text.removesuffix("m")
    if not _is_count(number) or int(number) < 1:
        raise ValueError(
            f"checkpoint_every must look like 500 (steps) or 10m (minutes), got {_cut(text)!r}"
        )
    return (int(number), 0.0) if number == text else (0, 60.0 * int(number))


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with rsfast: the architectures, and "builtin"."""
    files = resources.files("rsfast.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def read_config(file: Path) -> TrainConfig:
    """The settings of a config.toml, without any recipe.

    Raises:
        ValueError: if it cannot be read or holds anything else.
    """
    return TrainConfig(**_read_toml(file))


def parse_args(
    argv: Sequence[str] | None = None, prog: str = "rsfast.train", about: str = ""
) -> TrainConfig:
    """The config of a command line: defaults, recipe of the arch, --config file, then flags.

    Without data, the recipe of the built-in set comes after that of the arch: its images are small,
    and the paper's batch at 224 pixels does not fit every machine.

    Exits with status 2 and one sentence on bad input.

    Args:
        argv: without the program's name; of this process by default.
        prog, about: of the help text.
    """
    parser = _build_parser(prog, about or "Trains a resolution switchable network.")
    flags = vars(parser.parse_args(argv))
    try:
        file = flags.pop("config", None)
        from_file = _read_toml(Path(file)) if file is not None else {}
        arch = flags.get("arch", from_file.get("arch", TrainConfig().arch))
        values = _read_recipe(NETWORKS[arch].recipe) if arch in NETWORKS else {}
        given = {**from_file, **flags}
        if "data" not in given and given.get("loader") != "synthetic":
            values |= _read_recipe("builtin")
        values |= given
        if values.get("distill") in _AUTHORS_KD_TYPES:
            values["distill"] = _AUTHORS_KD_TYPES[values["distill"]]
        return TrainConfig(**values)
    except ValueError as error:
        parser.error(str(error))


def _build_parser(prog: str, about: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=about,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings in TOML, over the recipe's")
    hints, docs = typing.get_type_hints(TrainConfig), _field_docs(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        text = docs[field.name]
        if field.default is not None:
            text += f" (default {shown(field.default)})"
        options: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%")}
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
            options["action"] = _Tuple
        else:
            options["type"] = kind
            if field.name in _CHOICES:
                options["metavar"] = "{" + ",".join(_CHOICES[field.name]) + "}"
        parser.add_argument(flag, *_ALIASES.get(field.name, ()), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, whatever the user has typed."""

    def error(self, message: str) -> NoReturn:
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        self.exit(2, f"{self.prog}: error: {''.join(shown)} (--help lists all flags)\n")


class _Tuple(argparse.Action):
    """Stores the values of one option as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, tuple(values))


def shown(value: Any) -> str:
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = str(ast.literal_eval(doc.value))
    return docs


def _read_recipe(name: str) -> dict[str, Any]:
    with resources.as_file(resources.files("rsfast.recipes") / f"{name}.toml") as file:
        return _read_toml(file)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:  # of TOML, of UTF-8, of too long numbers and names
        raise ValueError(f"config file {file} cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"config file {file} is nested too deeply") from error
    hints = typing.get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"config file {file}: unknown setting {key!r}")
        values[key] = _typed(file, key, value, hints[key])
    return values


def _typed(file: Path, key: str, value: Any, kind: Any) -> Any:
    """The value as its field wants it: TOML has no tuples, and writes 1 for 1.0."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(_typed(file, key, part, item) for part in value)
    if kind is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"config file {file}: {key} must be {getattr(kind, '__name__', kind)}, "
            f"got {_cut(repr(value))}"
        )
    return value
