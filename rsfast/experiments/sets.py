"""Which trainings a table or figure of the paper needs, and what it compares.

A training is one network. A method is a row of a table: at each tested resolution it takes one of
the trainings, so that "I-Nets" is five networks and "RS-Net" is one. All trainings share the base
settings; a training says only what makes it another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rsfast.models.lq import FULL_PRECISION
from rsfast.models.resnet_lq import LQ_RESNETS

__all__ = [
    "FIG9_CROP_AREA",
    "QUANTISED_SETS",
    "SETS",
    "Cell",
    "Comparison",
    "ExperimentSet",
    "Method",
    "Training",
    "make_set",
    "papers_network",
]

INETS, RS_NET, PARALLEL = "I-Nets", "RS-Net", "parallel"
FIG9_CROP_AREA = (0.3, 1.0)


@dataclass(frozen=True)
class Training:
    """One network.

    Attributes:
        name: of its folder.
        settings: that make it what it is.
    """

    name: str
    settings: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Cell:
    """Where a figure of a table comes from.

    Attributes:
        training: that is tested.
        between: where its batch-norm bank comes from if it was not trained at that resolution.
    """

    training: Training
    between: str = "interpolate"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        name: as the paper calls it.
        cells: by tested resolution, in pixels.
    """

    name: str
    cells: Mapping[int, Cell]


@dataclass(frozen=True)
class Comparison:
    """Method `ours` against method `theirs`, at the resolutions that both have."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class ExperimentSet:
    """What it takes to repeat a table or figure.

    Attributes:
        name: of the set.
        about: what the paper shows there.
        methods: rows of the table.
        comparisons: of two of them.
        task: of the networks.
    """

    name: str
    about: str
    methods: Sequence[Method]
    comparisons: Sequence[Comparison]
    task: str = "classification"

    @property
    def trainings(self) -> list[Training]:
        """Each once, in the order of the rows."""
        cells = (cell for method in self.methods for cell in method.cells.values())
        return list({cell.training.name: cell.training for cell in cells}.values())

    def tested(self, training: Training) -> dict[str, list[int]]:
        """The resolutions at which a training is tested, by the way between resolutions."""
        found: dict[str, list[int]] = {}
        for method in self.methods:
            for resolution, cell in method.cells.items():
                if cell.training == training:
                    found.setdefault(cell.between, []).append(resolution)
        return found


def _network(name: str, resolutions: Sequence[int], **settings: Any) -> Training:
    """Settings that no row names are those of parallel training with private batch norm."""
    base = {"distill": "none", "bn": "private", "crop": "single", "copies": 1}
    return Training(name, {"resolutions": tuple(resolutions), **base, **settings})


def _rs_net(resolutions: Sequence[int]) -> Training:
    return _network("rs_net", resolutions, distill="full")


def _of_bits(arch: str, weight: int, activation: int) -> tuple[str, dict[str, Any]]:
    """What the paper calls these bits, and the settings of a network with them."""
    # Where the base has what these bits would refuse.
    settings: dict[str, Any] = (
        {"zero_init_residual": None} if activation == 2 else {"fix_activation_basis": False}
    )
    if weight == FULL_PRECISION:
        settings |= {"arch": LQ_RESNETS[arch], "weight_bits": None, "activation_bits": None}
    else:
        settings |= {"arch": arch, "weight_bits": weight, "activation_bits": activation}
    return f"{weight}/{activation}", settings


def _everywhere(name: str, training: Training, resolutions: Sequence[int]) -> Method:
    return Method(name, {r: Cell(training) for r in resolutions})


def _inets(resolutions: Sequence[int], suffix: str = "", **settings: Any) -> Method:
    trainings = {r: _network(f"inet_{r}{suffix}", [r], **settings) for r in resolutions}
    return Method(INETS, {r: Cell(training) for r, training in trainings.items()})


def _table2(resolutions: Sequence[int]) -> ExperimentSet:
    largest = resolutions[0]
    inets = _inets(resolutions)
    largest_everywhere = f"I-{largest}"
    methods = [
        inets,
        _everywhere(largest_everywhere, inets.cells[largest].training, resolutions),
        _everywhere(PARALLEL, _network("parallel", resolutions), resolutions),
        _everywhere(RS_NET, _rs_net(resolutions), resolutions),
    ]
    comparisons = [
        Comparison(RS_NET, INETS),
        Comparison(RS_NET, PARALLEL),
        Comparison(PARALLEL, INETS),
        Comparison(largest_everywhere, INETS),
    ]
    about = "one network for all resolutions against one for each"
    return ExperimentSet("table2", about, methods, comparisons)


def _table3(resolutions: Sequence[int], arch: str) -> ExperimentSet:
    about = "one quantised network for all resolutions against one for each"
    return _quantised("table3", about, resolutions, arch, [(2, 32), (2, 2)])


def _bits(resolutions: Sequence[int], arch: str) -> ExperimentSet:
    about = "what quantisation costs: full precision, weights of 2 bits, activations of 2 bits, too"
    bits = [(FULL_PRECISION, FULL_PRECISION), (2, 32), (2, 2)]
    which = _quantised("bits", about, resolutions, arch, bits)
    steps = [
        Comparison(f"{fine} {kind}", f"{coarse} {kind}")
        for fine, coarse in (("32/32", "2/32"), ("2/32", "2/2"))
        for kind in (INETS, RS_NET)
    ]
    return replace(which, comparisons=[*which.comparisons, *steps])


def _quantised(
    name: str,
    about: str,
    resolutions: Sequence[int],
    arch: str,
    all_bits: Sequence[tuple[int, int]],
) -> ExperimentSet:
    """I-Nets and RS-Net with each of the bits of weights and activations."""
    if arch not in LQ_RESNETS:
        raise ValueError(
            f"{name} is of quantised networks: take --arch {' or '.join(LQ_RESNETS)}, got {arch}"
        )
    methods, comparisons = [], []
    for weight, activation in all_bits:
        label, settings = _of_bits(arch, weight, activation)
        suffix = f"_w{weight}a{activation}"
        inets = _inets(resolutions, suffix, **settings)
        rs_net = _network(f"rs_net{suffix}", resolutions, **{"distill": "full", **settings})
        methods.append(replace(inets, name=f"{label} {INETS}"))
        methods.append(_everywhere(f"{label} {RS_NET}", rs_net, resolutions))
        comparisons.append(Comparison(methods[-1].name, methods[-2].name))
    return ExperimentSet(name, about, methods, comparisons)


def _table5(resolutions: Sequence[int]) -> ExperimentSet:
    modes = {
        "vanilla": "RS-Net, vanilla",
        "no_ensemble": "RS-Net, no ensemble",
        "largest": "RS-Net, largest only",
    }
    methods = [_everywhere(RS_NET, _rs_net(resolutions), resolutions)]
    for mode, name in modes.items():
        training = _network(f"rs_net_{mode}", resolutions, distill=mode)
        methods.append(_everywhere(name, training, resolutions))
    comparisons = [Comparison(RS_NET, name) for name in modes.values()]
    return ExperimentSet("table5", "which resolutions teach which", methods, comparisons)


def _table6(resolutions: Sequence[int]) -> ExperimentSet:
    one, many = "single-resolution, multi-crop", "multi-resolution, multi-crop"
    multi_crop = _network("rs_net_multi_crop", resolutions, distill="full", crop="multi")
    copies = {
        r: _network(
            f"copies_{r}", [r], distill="full", crop="multi", bn="shared", copies=len(resolutions)
        )
        for r in resolutions
    }
    methods = [
        _everywhere(RS_NET, _rs_net(resolutions), resolutions),
        _everywhere(many, multi_crop, resolutions),
        Method(one, {r: Cell(training) for r, training in copies.items()}),
        _inets(resolutions),  # copies of one resolution that share a crop are one
    ]
    comparisons = [
        Comparison(RS_NET, many),
        Comparison(RS_NET, one),
        Comparison(many, INETS),
        Comparison(one, INETS),
    ]
    about = "one crop for all resolutions, and several resolutions: do both matter"
    return ExperimentSet("table6", about, methods, comparisons)


def _table7(resolutions: Sequence[int]) -> ExperimentSet:
    about = "segmentation: one network for all resolutions against one for each"
    methods = [_inets(resolutions), _everywhere(RS_NET, _rs_net(resolutions), resolutions)]
    return ExperimentSet("table7", about, methods, [Comparison(RS_NET, INETS)], "segmentation")


def _fig4(resolutions: Sequence[int]) -> ExperimentSet:
    private, shared = "parallel, private BN", "parallel, shared BN"
    interpolated, nearest = "RS-Net, interpolated BN", "RS-Net, nearest BN"
    rs_net = _rs_net(resolutions)
    halfway = [(a + b) // 2 for a, b in itertools.pairwise(resolutions)]
    unseen = [r for r in halfway if r not in resolutions]
    methods = [
        _everywhere(private, _network("parallel", resolutions), resolutions),
        _everywhere(shared, _network("parallel_shared_bn", resolutions, bn="shared"), resolutions),
        _everywhere(RS_NET, rs_net, resolutions),
        Method(interpolated, {r: Cell(rs_net) for r in unseen}),
        Method(nearest, {r: Cell(rs_net, "nearest") for r in unseen}),
    ]
    comparisons = [Comparison(private, shared), Comparison(interpolated, nearest)]
    about = "private against shared batch norm, and resolutions between the trained ones"
    return ExperimentSet("fig4", about, methods, comparisons)


def _pairs(
    name: str, resolutions: Sequence[int], about: str, suffix: str = "", **settings: Any
) -> ExperimentSet:
    methods = [_inets(resolutions, suffix, **settings)]
    for pair in itertools.combinations(resolutions, 2):
        training = _network(f"parallel_{pair[0]}_{pair[1]}{suffix}", pair, **settings)
        methods.append(_everywhere(f"{pair[0]} and {pair[1]}", training, pair))
    comparisons = [Comparison(method.name, INETS) for method in methods[1:]]
    return ExperimentSet(name, about, methods, comparisons)


def _fig5(resolutions: Sequence[int]) -> ExperimentSet:
    about = "what two resolutions, trained in parallel, do to each other"
    return _pairs("fig5", resolutions, about)


def _fig9(resolutions: Sequence[int]) -> ExperimentSet:
    about = "the same with crops of at least 0.3 of the image's area"
    return _pairs("fig9", resolutions, about, "_area30", crop_area=FIG9_CROP_AREA)


_MAKERS: dict[str, Callable[[Sequence[int]], ExperimentSet]] = {
    "table2": _table2,
    "table5": _table5,
    "table6": _table6,
    "table7": _table7,
    "fig4": _fig4,
    "fig5": _fig5,
    "fig9": _fig9,
}
# Of quantised networks, whose rows depend on the architecture.
_QUANTISED: dict[str, Callable[[Sequence[int], str], ExperimentSet]] = {
    "table3": _table3,
    "bits": _bits,
}
QUANTISED_SETS = tuple(_QUANTISED)
# Of networks of another task than classification, and the network that the paper takes for them.
_PAPERS_NETWORKS = {"table7": "refinenet101"}
SETS = (*_MAKERS, *QUANTISED_SETS)


def papers_network(names: Sequence[str]) -> str | None:
    """The network that all these sets are of, where that is not the default of a training."""
    (found, *others) = {_PAPERS_NETWORKS.get(name) for name in names}
    return None if others else found


def make_set(name: str, resolutions: Sequence[int], arch: str = "") -> ExperimentSet:
    """A set of :data:`SETS` for these resolutions.

    Args:
        name: of the set.
        resolutions: in pixels, descending.
        arch: of the base settings, for a set of quantised networks.

    Raises:
        ValueError: if there are fewer than two resolutions, or the set is of quantised networks and
            the architecture is not.
    """
    if len(resolutions) < 2:
        raise ValueError(f"resolutions must be at least two to compare, got {tuple(resolutions)}")
    maker = _QUANTISED.get(name)
    made = maker(resolutions, arch) if maker else _MAKERS[name](resolutions)
    # Between neighbours of one pixel there is nothing unseen.
    methods = [method for method in made.methods if method.cells]
    names = {method.name for method in methods}
    pairs = [pair for pair in made.comparisons if {pair.ours, pair.theirs} <= names]
    return replace(made, methods=methods, comparisons=pairs)
