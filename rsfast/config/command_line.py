"""Recipes, config files and the command line of a run, all made from the fields of TrainConfig."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import tomllib
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from rsfast.config.flags import refuse_unknown
from rsfast.config.older import completed
from rsfast.config.rules import LARGEST, cut, rules_of
from rsfast.config.train_config import TrainConfig
from rsfast.models.registry import recipe_of, task_of

__all__ = ["as_flag", "parse_args", "read_config", "recipe_names", "shown"]

# The authors' spelling of two options.
_ALIASES = {"resolutions": ("--sizes",), "distill": ("--kd-type",)}
_AUTHORS_KD_TYPES = {"ens_topdown": "full", "ens": "vanilla"}


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes of rsfast: of networks, of the built-in sets, and of fine-tuning."""
    files = resources.files("rsfast.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def read_config(file: Path) -> TrainConfig:
    """The settings of a run's config.toml, without any recipe.

    What an older rsfast did not write has the value that it was trained with.

    Raises:
        ValueError: if it cannot be read or holds anything else.
    """
    return TrainConfig(**completed(_read_toml(file)))


def parse_args(
    argv: Sequence[str] | None = None, prog: str = "rsfast.train", about: str = ""
) -> TrainConfig:
    """The config of a command line: defaults, recipe of the arch, --config file, then flags.

    Networks of other packages and of one's own have no recipe. Without data, the recipe of the
    built-in set of the task comes after that of the arch: its images are small, and the paper's
    batch at 224 pixels does not fit every machine.

    Exits with status 2 and one sentence on bad input.

    Args:
        argv: without the program's name; of this process by default.
        prog, about: of the help text.
    """
    parser = _build_parser(prog, about or "Trains a resolution switchable network.")
    known, unknown = parser.parse_known_args(argv)
    refuse_unknown(parser, unknown)
    flags = vars(known)
    try:
        file = flags.pop("config", None)
        from_file = _read_file_or_recipe(file) if file is not None else {}
        arch = flags.get("arch", from_file.get("arch", TrainConfig().arch))
        recipe = recipe_of(arch)
        values = _read_recipe(recipe) if recipe else {}
        given = {**from_file, **flags}
        named = {"data", "train_data", "val_data"} & given.keys()
        if not named and given.get("loader") != "synthetic":
            task = given.get("task") or task_of(arch)
            values |= _read_recipe(f"builtin_{task}" if task == "segmentation" else "builtin")
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
    about_file = (
        "settings in TOML, over the recipe's; or a recipe of rsfast, such as resnet50_finetune or "
        "resnet18_w2a2"
    )
    parser.add_argument("--config", metavar="FILE", help=about_file)
    hints, docs = typing.get_type_hints(TrainConfig), _field_docs(TrainConfig)
    rules = rules_of(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        text = docs[field.name]
        if field.default is not None and field.default != ():
            text += f" (default {shown(field.default)})"
        options: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%")}
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {
                "type": typing.get_args(kind)[0],
                "nargs": "*" if field.default == () else "+",
            }
            options["action"] = _Tuple
        else:
            options["type"] = kind
            listed = rules[field.name].choices or rules[field.name].forms
            if listed:
                options["metavar"] = "{" + ",".join(listed) + "}"
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


def as_flag(name: str, value: Any) -> str:
    """What to type for a setting, in brackets after a space; empty for None, which is no flag's."""
    flag = name.replace("_", "-")
    if value is None:
        return ""
    if isinstance(value, bool):
        return f" (--{flag})" if value else f" (--no-{flag})"
    return f" (--{flag} {shown(value)}".rstrip() + ")"


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = str(ast.literal_eval(doc.value))
    return docs


def _read_file_or_recipe(name: str) -> dict[str, Any]:
    """A file goes before a recipe of that name."""
    if name in recipe_names() and not Path(name).exists():
        return _read_recipe(name)
    if not Path(name).exists() and not name.endswith(".toml"):
        raise ValueError(
            f"config must be a TOML file or a recipe, got {cut(name)}, which is no file; recipes "
            f"of rsfast are: {', '.join(recipe_names())}; for other networks add --arch to one"
        )
    return _read_toml(Path(name))


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
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"config file {file}: {key} must be {getattr(kind, '__name__', kind)}, "
            f"got {cut(repr(value))}"
        )
    return value
