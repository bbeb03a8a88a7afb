"""Networks and images without content: tensors that have a device, a shape and no memory.

They are PyTorch's fake tensors. Operations on them compute shapes, strides, dtypes and devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from rsfast import Pyramid, create_model
from rsfast.data import Batch, Mix
from rsfast.engine import PRECISIONS
from rsfast.models import RSNet
from rsfast.tasks import task_of

__all__ = ["hollow", "hollow_batch", "hollow_network"]

_PADDED_CHANNELS = 4  # as `rsfast.train` asks loaders for on a GPU


@functools.cache
def hollow() -> FakeTensorMode:
    """The block in which tensors are made without content; one, so that they can meet."""
    return FakeTensorMode()


def hollow_network(
    arch: str, resolutions: Sequence[int], num_classes: int, backend: str, device: str = "cuda"
) -> tuple[RSNet, nn.Module]:
    """Network and loss of its task, to be made within :func:`hollow`."""
    with unset_fake_temporarily(), torch.device("meta"):  # where no weights are drawn
        model = create_model(arch, resolutions, num_classes, backend=backend)
        loss = task_of(model).loss(len(resolutions), backend=backend)
    for module in (*model.modules(), *loss.modules()):
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_hollow(param, device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _hollow(buffer, device))
    return model.train(), loss


def hollow_batch(
    resolutions: Sequence[int],
    num_images: int,
    precision: str,
    device: str = "cuda",
    *,
    mixed: bool = False,
    task: str = "classification",
) -> Batch:
    """Images as `rsfast.train` feeds them on a GPU, to be made within :func:`hollow`."""
    pixels = num_images * sum(r * r for r in resolutions)
    dtype = PRECISIONS[precision] or torch.float32
    rows = torch.empty(pixels, _PADDED_CHANNELS, dtype=dtype, device=device)
    indices = torch.empty(num_images, dtype=torch.int64, device=device)
    labels = indices
    if task == "segmentation":
        maps = num_images, resolutions[0], resolutions[0]
        labels = torch.empty(maps, dtype=torch.uint8, device=device)
    images = Pyramid(rows, [(r, r) for r in resolutions], num_images)
    mix = Mix(labels.clone(), torch.empty(num_images, device=device)) if mixed else None
    return Batch(images, labels, indices, mix)


def _hollow(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
