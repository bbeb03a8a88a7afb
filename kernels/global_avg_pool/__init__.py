"""Global average pooling of packed rows."""

from rsfast.kernels.global_avg_pool.op import global_avg_pool
from rsfast.kernels.global_avg_pool.reference import global_avg_pool_reference

__all__ = ["global_avg_pool", "global_avg_pool_reference"]
