"""Which versions of the runtimes compute exported networks right."""

from __future__ import annotations

import re

__all__ = ["ONNXRUNTIME_AT_LEAST", "check_onnxruntime"]

# Before it a quantised convolution whose bias is computed at run time, as in the int8 file, gives
# wrong values and no error.
ONNXRUNTIME_AT_LEAST = (1, 31, 1)


def check_onnxruntime(version: str) -> None:
    """Refuses versions of ONNX Runtime that compute the int8 file wrongly.

    Args:
        version: as in `onnxruntime.__version__`.

    Raises:
        ImportError: if it is older than `ONNXRUNTIME_AT_LEAST`.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if found < ONNXRUNTIME_AT_LEAST:
        wanted = ".".join(map(str, ONNXRUNTIME_AT_LEAST))
        raise ImportError(
            f"onnxruntime must be of version {wanted} or later, earlier ones compute int8 wrongly, "
            f"got {version}: pip install 'rsfast[export]'"
        )
