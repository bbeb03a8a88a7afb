"""One ONNX graph for every input size: batch norm's scale and shift are computed from the shape.

The tables of all banks and all layers are one matrix. A row of shares, which the height of the
input decides by the rule of `RSNet.at`, times that matrix gives gamma, beta, mean and variance of
every layer at once; a dozen nodes, whatever the depth. A runtime that knows the input's shape
beforehand folds them away and the batch norms into the convolutions: what is left is the plain
network of that size.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast.models import RSNet
from rsfast.pyramid import SwitchableBatchNorm2d
from rsfast.pyramid.convert import replace_norms, to_single, with_plain_modules

__all__ = [
    "INPUT",
    "OUTPUT",
    "FromShape",
    "import_onnx",
    "refuse_other_tasks",
    "sizes_of",
    "to_onnx",
]

INPUT, OUTPUT = "images", "logits"
BATCH, SIZE = "batch", "size"  # symbolic dimensions
OPSET = 18  # the oldest that PyTorch's exporter writes, for the most runtimes
_BEYOND = 2  # the graph takes images so many times as large or small as the trained ones
_SMALL = 2**20  # elements: constants up to this size are looked at for being there twice
_FAR = 1e9  # pixels: the neighbour that the outermost resolutions do not have


@torch.no_grad()
def sizes_of(model: RSNet) -> tuple[int, int]:
    """The smallest and largest input that an exported network takes, in pixels.

    Half the smallest trained size and twice the largest; the trained ones themselves where the
    network does not run beyond.
    """
    lowest, highest = model.resolutions[-1], model.resolutions[0]

    def runs_at(size: int) -> bool:
        try:
            model.at(size)(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError):
            return False
        return True

    smaller, larger = max(1, lowest // _BEYOND), highest * _BEYOND
    return smaller if runs_at(smaller) else lowest, larger if runs_at(larger) else highest


class FromShape(nn.Module):
    """A network whose batch norms are those of the input's size: any size, trained or not.

    Args:
        model: is copied.
        preprocess: whether the input is pixels as they are stored, uint8, instead of normalised
            float32.

    Shape:
        [N, 3, r, r] -> [N, K]; equal to `model.at(r)` of the same images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: RSNet, preprocess: bool = False) -> None:
        super().__init__()
        self.shares: _Shares | None = None
        if model.bn == "shared" or len(model.resolutions) == 1:
            self.network = to_single(model.network, ((0, 1.0),))
        else:
            banks: list[tuple[Tensor, Tensor]] = []
            norms: list[SwitchableBatchNorm2d] = []

            def make(norm: SwitchableBatchNorm2d) -> nn.Module:
                norms.append(norm)
                return _Norm(norm, banks, len(norms) - 1)

            self.network = with_plain_modules(replace_norms(model.network, make))
            self.shares = _Shares(model.resolutions, norms, banks)
        # The exporter writes strides that are not row-major as operators of their own.
        for param in self.network.parameters():
            # `contiguous` leaves a 1x1 kernel as it is.
            param.data = param.data.clone(memory_format=torch.contiguous_format)
        self.preprocess = preprocess
        self.register_buffer("mean", _per_channel(model.input_mean))
        self.register_buffer("std", _per_channel(model.input_std))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        torch._check(images.shape[2] == images.shape[3])
        if self.shares is not None:
            self.shares(images.shape[2])
        if self.preprocess:
            images = (images.float() / 255.0 - self.mean) / self.std
        return self.network(images)


class _Shares(nn.Module):
    """Scale and shift of every layer at one size, put where the layers find them."""

    below: Tensor
    above: Tensor
    gap_below: Tensor
    gap_above: Tensor
    table: Tensor

    def __init__(
        self,
        resolutions: Sequence[int],
        norms: Sequence[SwitchableBatchNorm2d],
        banks: list[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.banks = banks
        self.widths = [norm.num_features for norm in norms]
        sizes = torch.tensor([float(r) for r in resolutions])
        gaps = sizes[:-1] - sizes[1:]
        one, far = torch.ones(1), torch.tensor([_FAR])
        self.register_buffer("below", torch.cat([sizes[1:], sizes[-1:] - far]))
        self.register_buffer("above", torch.cat([sizes[:1] + far, sizes[:-1]]))
        self.register_buffer("gap_below", torch.cat([gaps, one]))
        self.register_buffer("gap_above", torch.cat([one, gaps]))
        fields = [
            [norm.weight, norm.bias, norm.running_mean, norm.running_var + norm.eps]
            for norm in norms
        ]
        # [R, 4 * C_total]: gammas of all layers, then betas, means, variances with their eps.
        columns = [layer[field] for field in range(4) for layer in fields]
        self.register_buffer("table", torch.cat(columns, dim=1).detach().float())

    def forward(self, height: int) -> None:
        size = torch.scalar_tensor(height, dtype=torch.float32)
        # A hat function per resolution: 1 at its own size, 0 at the neighbours'; flat outside.
        rising = (size - self.below) / self.gap_below
        falling = (self.above - size) / self.gap_above
        shares = torch.minimum(rising, falling).clamp(0.0, 1.0)  # [R], adds up to 1
        gamma, beta, mean, var = (shares[None] @ self.table).reshape(4, -1).unbind(0)
        scale = gamma / torch.sqrt(var)
        shift = beta - mean * scale
        self.banks[:] = zip(scale.split(self.widths), shift.split(self.widths), strict=True)


class _Norm(nn.Module):
    """Takes scale and shift from where :class:`_Shares` puts them.

    It stays a batch norm, of mean 0 and variance 1: runtimes compute it in one pass, and know how
    it goes into a convolution.
    """

    zeros: Tensor
    ones: Tensor

    def __init__(
        self, norm: SwitchableBatchNorm2d, banks: list[tuple[Tensor, Tensor]], index: int
    ) -> None:
        super().__init__()
        self._banks = banks
        self._index = index
        self.register_buffer("zeros", torch.zeros(norm.num_features))
        self.register_buffer("ones", torch.ones(norm.num_features))
        for name, child in norm.named_children():  # what timm's layers do after normalising
            self.add_module(name, copy.deepcopy(child))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self._banks[self._index]
        x = F.batch_norm(x, self.zeros, self.ones, scale, shift, eps=0.0)
        for child in self.children():
            x = child(x)
        return x


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def import_onnx() -> ModuleType:
    """The onnx package.

    Raises:
        ImportError: if it, or what PyTorch's exporter needs beside it, is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (PyTorch's exporter)
    except ImportError as error:
        raise ImportError(f"export needs {error.name}: pip install 'rsfast[export]'") from error
    return onnx


def refuse_other_tasks(model: RSNet) -> None:
    """Before any work.

    Raises:
        ValueError: if the network's logits are maps.
    """
    if model.task != "classification":
        raise ValueError(
            f"export writes networks of classification only, and {model.arch} is of {model.task}: "
            f"RSNet.at(resolution) is a plain PyTorch network to be served"
        )


def to_onnx(model: RSNet, preprocess: bool = False) -> Any:
    """The graph of :class:`FromShape` as an `onnx.ModelProto`.

    Input "images" [batch, 3, size, size], output "logits" [batch, K]; float32 weights.

    Args:
        model: on the CPU, of float32.
        preprocess: see :class:`FromShape`.

    Raises:
        ValueError: in one sentence, if PyTorch cannot export the network for every size, or it is
            of another task than classification.
        ImportError: if a package of the extra `export` is absent.
    """
    refuse_other_tasks(model)
    import_onnx()
    from onnx_ir.passes.common import DeduplicateInitializersPass

    # AUTO: PyTorch's own limits are not wanted. It finds conditions on how memory is laid out where
    # a map has one pixel, which no operator of the graph has.
    size = torch.export.Dim.AUTO
    shapes = ({0: torch.export.Dim("batch"), 2: size, 3: size},)
    images = torch.zeros(2, 3, model.resolutions[0], model.resolutions[0])  # of 1 would be fixed
    images = images.to(torch.uint8 if preprocess else torch.float32)
    network = FromShape(model, preprocess)
    try:
        with torch.no_grad(), _quiet():
            traced = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # what the exporter raises is not documented
        raise ValueError(f"network cannot be exported: {_reason(error)}") from error
    assert program is not None
    DeduplicateInitializersPass(size_limit=_SMALL)(program.model)
    graph = program.model_proto
    _name_dimensions(graph)
    _forget_sources(graph)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, on packages that it does not find and on its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _name_dimensions(graph: Any) -> None:
    """Calls the dimensions of the input by names, by which runtimes pin them."""
    del graph.graph.value_info[:]  # which has the exporter's names
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    for axis, name in ((0, BATCH), (2, SIZE), (3, SIZE)):
        dims[axis].dim_param = name
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_param = BATCH


def _forget_sources(graph: Any) -> None:
    """Takes out what the exporter notes of the Python code that it saw: paths, mostly."""
    del graph.metadata_props[:]
    body = graph.graph
    for part in (body, *body.node, *body.input, *body.output, *body.value_info, *body.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    assert not graph.functions
