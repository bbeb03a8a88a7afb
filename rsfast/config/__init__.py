"""The settings of a run: one frozen dataclass, from which files and the command line follow."""

from rsfast.config.command_line import parse_args, read_config, recipe_names, shown
from rsfast.config.rules import Rule, rules_of
from rsfast.config.train_config import TrainConfig, checkpoint_interval, profiled_steps

__all__ = [
    "Rule",
    "TrainConfig",
    "checkpoint_interval",
    "parse_args",
    "profiled_steps",
    "read_config",
    "recipe_names",
    "rules_of",
    "shown",
]
