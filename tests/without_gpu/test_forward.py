"""Forward and loss of every network on a pretended GPU: devices, dtypes, and shapes without values.

An operator without a rule for shapes fails here, and so does one that mixes devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.support.hollow import hollow, hollow_batch, hollow_network
from rsfast.engine import PRECISIONS
from rsfast.models.registry import ARCHITECTURES
from without_gpu.pretended import FORWARDS, pretended_gpu
from without_gpu.watch import HostWaits

pytestmark = FORWARDS
RESOLUTIONS = (224, 160)


@pytest.fixture
def _gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_forward_and_loss_stay_on_the_gpu_in_their_types(
    backend: str, precision: str, arch: str
) -> None:
    dtype = PRECISIONS[precision]
    with hollow():
        model, loss = hollow_network(arch, RESOLUTIONS, 100, backend)
        batch = hollow_batch(RESOLUTIONS, 8, precision, task=model.task)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss(model(batch.images), batch.labels)  # makes constants
            with HostWaits() as watch:
                logits = model(batch.images)
                terms = loss(logits, batch.labels)
    if model.task == "segmentation":
        assert [logits.level(n).shape for n in (0, 1)] == [(8, 100, 56, 56), (8, 100, 40, 40)]
        logits = logits.rows
    else:
        assert logits.shape == (2, 8, 100)
    assert (logits.device.type, logits.dtype) == ("cuda", dtype or torch.float32)
    assert {(term.device.type, term.dtype) for term in terms} == {("cuda", torch.float32)}
    assert not watch.found


@pytest.mark.usefixtures("_gpu")
def test_a_copy_from_the_host_and_one_to_it_are_seen() -> None:
    with hollow(), HostWaits() as watch:
        x = torch.ones(3).cuda()
        x.cpu()
        x.add_(torch.ones(()))  # a number, which a kernel gets as an argument
    assert {name for name, _ in watch.found} == {"aten._to_copy.default", "Tensor.cpu"}
