"""What the operations share: argument checks, levels, where kernels run, statistics over ranks."""
