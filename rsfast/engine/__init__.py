"""One training step, eager or captured, and what it is made of."""

from rsfast.engine.step import PRECISIONS, TrainStep, is_out_of_memory

__all__ = ["PRECISIONS", "TrainStep", "is_out_of_memory"]
