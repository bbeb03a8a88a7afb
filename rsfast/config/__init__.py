"""The settings of a run: one frozen dataclass, from which files and the command line follow."""

from rsfast.config.command_line import as_flag, parse_args, read_config, recipe_names, shown
from rsfast.config.older import completed
from rsfast.config.rules import Rule, rules_of
from rsfast.config.texts import checkpoint_interval, profiled_steps
from rsfast.config.train_config import TrainConfig

__all__ = [
    "Rule",
    "TrainConfig",
    "as_flag",
    "checkpoint_interval",
    "completed",
    "parse_args",
    "profiled_steps",
    "read_config",
    "recipe_names",
    "rules_of",
    "shown",
]
