"""What a network is for, and a data set with it, by name.

Data and models both ask for it, and neither knows of the other; `rsfast.tasks` says what belongs to
each.
"""

from __future__ import annotations

__all__ = ["TASKS"]

TASKS = ("classification", "segmentation")
