"""Pyramid: the same N images at several sizes, which a network takes for one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.pyramid.content import Content
from rsfast.pyramid.dispatch import dispatch
from rsfast.pyramid.extent import extent_of

__all__ = ["Pyramid", "check_resolutions"]


def check_resolutions(resolutions: Sequence[int]) -> tuple[int, ...]:
    """The resolutions as a tuple.

    Raises:
        ValueError: unless they are positive integers in strictly descending order.
    """
    resolutions = tuple(resolutions)
    descending = all(a > b for a, b in itertools.pairwise(resolutions))
    if not resolutions or not descending or resolutions[-1] < 1:
        raise ValueError(
            "resolutions must be positive and strictly descending (the larger ones teach the "
            f"smaller ones), got {resolutions}"
        )
    return resolutions


class Pyramid:
    """N images (or feature maps) at L sizes; to torch functions one tensor of L * N images.

    Rows are NHWC pixels: all of level 0, then all of level 1, and so on. Packed, a level is a
    contiguous slice of them, and :meth:`level` is a channels-last view of it, never a copy; one
    matrix product sees every pixel. By level, each level's rows are a tensor of their own, which
    is what a CPU is faster with. Both hold the same numbers, and nothing else can tell them apart.

    Torch functions and methods take a pyramid for a tensor [L * N, C, H, W] in which H and W are
    different from level to level (:class:`Extent`); :mod:`rsfast.pyramid.functions` says what each
    of them means.

    Args:
        rows: [M, C] contiguous, any dtype, with M = sum over levels of N * H * W.
        sizes: (H, W) in pixels of each level, in the order of the rows.
        num_images: N, the same for all levels.
        banks: which private batch-norm bank each level uses; None lets the network derive it from
            the sizes.
        backend: what computes over the rows, "torch", "triton" or "cuda".

    Attributes:
        sizes, num_images, banks, backend: as given.

    Raises:
        ValueError: if the rows do not fit the sizes, or `banks` has another length than `sizes`.
    """

    __slots__ = ("_content", "backend", "banks", "num_images", "sizes")

    _content: Content

    def __init__(
        self,
        rows: Tensor,
        sizes: Sequence[tuple[int, int]],
        num_images: int,
        banks: Sequence[int] | None = None,
        backend: str = "torch",
    ) -> None:
        if rows.dim() != 2:
            raise ValueError(f"rows must be [M, C], got shape {tuple(rows.shape)}")
        if not sizes:
            raise ValueError("sizes must name at least one level, got none")
        self._fill(Content(rows=rows), sizes, num_images, banks, backend)
        if rows.shape[0] != sum(self.level_rows):
            raise ValueError(
                f"rows must have {sum(self.level_rows)} rows for {num_images} images of sizes "
                f"{self.sizes}, got {rows.shape[0]}"
            )

    def _fill(
        self,
        content: Content,
        sizes: Sequence[tuple[int, int]],
        num_images: int,
        banks: Sequence[int] | None,
        backend: str,
    ) -> None:
        self._content = content
        self.sizes = tuple(sizes)
        self.num_images = num_images
        self.banks = None if banks is None else tuple(banks)
        self.backend = backend
        if banks is not None and len(banks) != len(sizes):
            raise ValueError(
                f"banks must name one batch-norm bank per level ({len(sizes)}), got {len(banks)}"
            )

    @classmethod
    def pack(cls, levels: Sequence[Tensor], banks: Sequence[int] | None = None) -> Pyramid:
        """Copies one tensor per level into a new pyramid (no copy for a single channels-last one).

        Args:
            levels: L tensors [N, C, H_l, W_l] of one dtype and device, any memory format.
            banks: L indices of batch-norm banks, or None.

        Raises:
            ValueError: if there is no level, a level is not 4-D, or N, C, dtype or device differ.
        """
        levels = tuple(levels)
        _check_levels(levels)
        rows = [_rows_of(level) for level in levels]
        packed = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        return cls(packed, sizes, levels[0].shape[0], banks)

    def like(self, content: Content, sizes: Sequence[tuple[int, int]] | None = None) -> Pyramid:
        """Other pixels of the same images and banks, of other sizes if those are given."""
        made = object.__new__(Pyramid)
        sizes = self.sizes if sizes is None else sizes
        made._fill(content, sizes, self.num_images, self.banks, self.backend)
        return made

    @property
    def content(self) -> Content:
        """The pixels, pending or not."""
        return self._content

    def become(self, other: Pyramid) -> Pyramid:
        """Takes the pixels of another one, as in-place functions do; returns itself."""
        self._content, self.sizes = other._content, other.sizes
        return self

    @property
    def rows(self) -> Tensor:
        """[M, C], packed; copies them together if they lie by level."""
        content = self._content.get()
        if content.rows is None:
            assert content.parts is not None
            return torch.cat(content.parts)
        return content.rows

    @property
    def handed_on(self) -> Tensor:
        """`rows`, for readers whose backward returns a tensor that nobody else holds.

        It may be written over: see :mod:`rsfast.pyramid.pixelwise`.
        """
        handed_on = self._content.get().handed_on
        return self.rows if handed_on is None else handed_on

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The rows of each level; in autograd one split, so the backward is one concatenation."""
        content = self._content.get()
        if content.parts is not None:
            return content.parts
        assert content.rows is not None
        return torch.split(content.rows, list(self.level_rows))

    @property
    def is_packed(self) -> bool:
        """Whether the rows of all levels lie in one tensor."""
        return self._content.get().rows is not None

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sizes)

    @property
    def num_channels(self) -> int:
        """C; computes nothing."""
        pending = self._content.pending
        return self._content.sample.shape[1] if pending is None else pending.num_channels

    @property
    def level_rows(self) -> tuple[int, ...]:
        """N * H * W of each level."""
        return tuple(self.num_images * height * width for height, width in self.sizes)

    @property
    def is_pooled(self) -> bool:
        """Whether every map is one pixel."""
        return all(size == (1, 1) for size in self.sizes)

    def level(self, index: int) -> Tensor:
        """[N, C, H, W] channels-last view of one level."""
        index = range(self.num_levels)[index]
        content = self._content.get()
        if content.parts is not None:
            return self._as_images(content.parts[index], index)
        starts = (0, *itertools.accumulate(self.level_rows))
        return self._as_images(self.rows[starts[index] : starts[index + 1]], index)

    def levels(self) -> tuple[Tensor, ...]:
        """All levels as views [N, C, H, W], channels-last."""
        return tuple(self._as_images(part, index) for index, part in enumerate(self.parts))

    def by_level(self) -> Pyramid:
        """The same pixels, the rows of each level in a tensor of its own; views where packed."""
        return self.like(Content(parts=self.parts))

    def with_rows(self, rows: Tensor) -> Pyramid:
        """The same levels with other channels: `rows` is [M, C'], packed."""
        return self.like(Content(rows=rows))

    def with_banks(self, banks: Sequence[int]) -> Pyramid:
        """The same pixels, normalised with other batch-norm banks."""
        made = self.like(self._content)
        made._fill(self._content, self.sizes, self.num_images, banks, self.backend)
        return made

    def on_backend(self, backend: str) -> Pyramid:
        """The same pixels, computed on by another backend."""
        made = self.like(self._content)
        made.backend = backend
        return made

    def map_rows(self, f: Callable[[Tensor], Tensor]) -> Pyramid:
        """What `f` makes of the rows, [m, C] -> [m, C'], all at once or level by level."""
        content = self._content.get()
        if content.rows is not None:
            return self.like(Content(rows=f(content.rows)))
        assert content.parts is not None
        return self.like(Content(parts=[f(part) for part in content.parts]))

    def map_levels(self, f: Callable[..., Tensor]) -> Pyramid:
        """What `f` makes of the images of each level, [N, C, H, W] -> [N, C', H', W']."""
        return self.from_levels([f(level) for level in self.levels()])

    def from_levels(self, levels: Sequence[Tensor]) -> Pyramid:
        """A pyramid of these images [N, C', H', W'], laid out like this one."""
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        parts = [_rows_of(level).contiguous() for level in levels]
        pooled = all(size == (1, 1) for size in sizes)
        if self.is_packed or pooled:
            rows = torch.cat(parts) if len(parts) > 1 else parts[0]
            return self.like(Content(rows=rows), sizes)
        return self.like(Content(parts=parts), sizes)

    def as_tensor(self) -> Tensor:
        """[L * N, C, H, W], if all levels have one size.

        Raises:
            ValueError: if they do not.
        """
        if len(set(self.sizes)) > 1:
            raise ValueError(
                f"levels of sizes {self.sizes} are no tensor: the network has to pool them first"
            )
        height, width = self.sizes[0]
        rows = self.rows
        images = rows.view(-1, height, width, *rows.shape[1:])
        return images.movedim((1, 2), (-2, -1))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows; computes nothing."""
        return self._sample.dtype

    @property
    def device(self) -> torch.device:
        """Of the rows; computes nothing."""
        return self._sample.device

    @property
    def is_cuda(self) -> bool:
        """Whether the rows lie on a GPU."""
        return self.device.type == "cuda"

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to the rows."""
        return self._content.sample.requires_grad

    @property
    def _sample(self) -> Tensor:
        pending = self._content.pending
        return self._content.sample if pending is None else pending.like

    @property
    def ndim(self) -> int:
        """4, or more where channels are split into several dimensions."""
        return len(self.channel_shape) + 3

    def dim(self) -> int:
        """As `ndim`."""
        return self.ndim

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """(C,), or the sizes of the dimensions that channels are split into."""
        if self._content.pending is not None:
            return (self.num_channels,)
        return tuple(self._content.sample.shape[1:])

    @property
    def shape(self) -> tuple[Any, ...]:
        """(L * N, C, H, W); H and W are extents where levels differ in them."""
        heights, widths = zip(*self.sizes, strict=True)
        images = self.num_levels * self.num_images
        return images, *self.channel_shape, extent_of(heights), extent_of(widths)

    def size(self, dim: int | None = None) -> Any:
        """As `shape`, or one of it."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, dict(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None) if not name.startswith("_") else None
        if not callable(method):
            raise AttributeError(f"a Pyramid has no attribute {name!r}")
        return lambda *args, **kwargs: dispatch(method, (self, *args), kwargs)

    def __len__(self) -> int:
        return self.num_levels * self.num_images

    def __repr__(self) -> str:
        state = "pending, " if self._content.pending is not None else ""
        return f"Pyramid({state}C={self.channel_shape}, sizes={self.sizes}, N={self.num_images})"

    def _as_images(self, rows: Tensor, index: int) -> Tensor:
        height, width = self.sizes[index]
        images = rows.view(self.num_images, height, width, *rows.shape[1:])
        return images.movedim((1, 2), (-2, -1))


def _operator(name: str) -> Callable[..., Any]:
    plain = getattr(Tensor, name)

    def method(self: Pyramid, *args: Any) -> Any:
        return dispatch(plain, (self, *args), {})

    return method


_OPERATORS = (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul"),
    *("truediv", "rtruediv", "itruediv", "pow", "rpow", "neg", "getitem"),
)
for _name in _OPERATORS:
    setattr(Pyramid, f"__{_name}__", _operator(f"__{_name}__"))


def _rows_of(level: Tensor) -> Tensor:
    return level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])


def _check_levels(levels: tuple[Tensor, ...]) -> None:
    if not levels:
        raise ValueError("levels must hold at least one tensor, got none")
    first = levels[0]
    for index, level in enumerate(levels):
        if level.dim() != 4:
            raise ValueError(
                f"levels[{index}] must be [N, C, H, W], got shape {tuple(level.shape)}"
            )
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"levels[{index}] must have the [N, C] of levels[0], {tuple(first.shape[:2])}, "
                f"got {tuple(level.shape[:2])}"
            )
        if level.dtype != first.dtype or level.device != first.device:
            raise ValueError(
                f"levels[{index}] must be {first.dtype} on {first.device} like levels[0], "
                f"got {level.dtype} on {level.device}"
            )
