"""Weights of a file put into a network of rsfast, whoever wrote the file.

Batch norms: the single one of a torchvision or timm file is copied into every bank. A file with
banks (of rsfast, or of the authors' code) fills the bank of each resolution as that file's network
would serve it: with its bank of that resolution where it has one, else with gamma, beta, mean and
variance interpolated linearly between the two neighbours, and outside its range with the nearest.

A segmentation network takes the file of a classification network into its trunk, and keeps its own
decoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsfast.models.lq import check_state
from rsfast.models.parts import classifier_of, trunk_of
from rsfast.models.rsnet import RSNet
from rsfast.models.weight_file import Normalization, WeightFile, read_weights
from rsfast.models.weight_names import looks_like, other_names, without_prefixes
from rsfast.pyramid import SwitchableBatchNorm2d
from rsfast.pyramid.convert import bn_mixture

__all__ = ["Loaded", "load_pretrained"]

_LOG = logging.getLogger("rsfast")
_COUNTER = "num_batches_tracked"
_AUXILIARY = {
    "torchvision/googlenet": ("aux1.", "aux2."),
    "torchvision/inception_v3": ("AuxLogits.",),
}
_SHOWN = 3  # names in a sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What :func:`load_pretrained` has done.

    Attributes:
        path: of the file.
        sha256: of the file, in hex.
        source: what wrote the file: "rsfast", "the authors' code", or "another program".
        banks: how the batch-norm banks were filled, a sentence.
        classifier: what became of the classifier, or of the decoder, a sentence.
        warnings: sentences on what may not fit together.
    """

    path: str
    sha256: str
    source: str
    banks: str
    classifier: str
    warnings: tuple[str, ...] = ()


@torch.no_grad()
def load_pretrained(
    model: RSNet,
    path: str | Path,
    resolutions: Sequence[int] | None = None,
    normalization: Normalization | None = None,
) -> Loaded:
    """Fills a network with the weights of a file, and logs what it did.

    Args:
        model: of :func:`rsfast.create_model` or :func:`rsfast.convert`; unchanged if the file is
            refused.
        path: a state dict of torchvision, timm, the authors' code or rsfast, bare or within a
            checkpoint (averaged weights are preferred), .pth, .pt or .safetensors; float16 and
            bfloat16 are converted.
        resolutions: what sizes the file's banks are for, descending, where it does not say: a bare
            state dict of an RSNet, and the authors' files, whose five banks are taken for (224,
            192, 160, 128, 96). As many banks as `model` has are otherwise taken for its own.
        normalization: mean and deviation of the images that the network will get, RGB in [0, 1];
            a warning says if the weights expect others. Without it, the model's `input_mean` and
            `input_std` become what the weights expect, where the file says so.

    Returns:
        What was done, also in the log "rsfast". A classifier of another class count is left as
        it is in the model, and so is the decoder where the file is of the trunk.

    Raises:
        ValueError: naming the first few tensors that are missing, unexpected, of another shape or
            not finite, and the --arch that the file looks like; or if the file is damaged.
    """
    file = read_weights(Path(path), resolutions, len(model.resolutions), model.resolutions)
    target = _Target(model)
    tensors = _without_auxiliaries(model, max(_readings(file.tensors), key=target.matches))
    taken: set[str]
    classes: int | None
    trunk = target.in_trunk(file.tensors)
    if target.matches(trunk) > target.matches(tensors):
        tensors, taken, classes = trunk, target.decoder, 0
        head = f"the decoder and its classifier of {model.num_classes} start afresh"
    else:
        taken, classes = _without_other_classifier(target, tensors)
        head = _about_classifier(target, classes)
    values = dict(target.fit(file, tensors, taken))
    for name, value in values.items():
        target.tensors[name].copy_(value)
    if normalization is None and file.normalization is not None:
        model.input_mean, model.input_std = file.normalization
    loaded = Loaded(
        path=str(path),
        sha256=file.sha256,
        source=file.source,
        banks=_about_banks(model, file.resolutions if target.has_banks(tensors) else None),
        classifier=head,
        warnings=tuple(_warnings(model, file, classes, normalization)),
    )
    _LOG.info("pretrained %s, by %s, sha256 %s", path, file.source, file.sha256)
    _LOG.info("%s; %s", loaded.banks, loaded.classifier)
    for warning in loaded.warnings:
        _LOG.warning("%s", warning)
    return loaded


def _without_auxiliaries(model: RSNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second and third classifier of two networks, which rsfast builds without them."""
    left_out: tuple[str, ...] = _AUXILIARY.get(model.arch or "", ())
    return {name: t for name, t in tensors.items() if not name.startswith(left_out)}


def _readings(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for bare in without_prefixes(tensors):
        yield from other_names(bare)


class _Target:
    """The network to fill, without the prefix of RSNet."""

    def __init__(self, model: RSNet) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = model.network.state_dict()  # shares memory
        self.classifier = classifier_of(model.network, model.num_classes)
        modules = model.network.named_modules(remove_duplicate=False)
        trunk = trunk_of(model.network) if model.task == "segmentation" else None
        self._trunk = None if trunk is None else f"{trunk}."
        self._norms = {n for n, m in modules if isinstance(m, SwitchableBatchNorm2d)}

    def matches(self, tensors: dict[str, Tensor]) -> int:
        """How many tensors have a place here."""
        return sum(name in tensors and self._fits(name, tensors[name]) for name in self.tensors)

    @property
    def decoder(self) -> set[str]:
        """Names of what is not of the trunk."""
        return {name for name in self.tensors if not name.startswith(self._trunk or "")}

    def in_trunk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors by their names in the trunk, without its classifier; {} without one."""
        if self._trunk is None:
            return {}
        readings = (
            {f"{self._trunk}{name}": tensor for name, tensor in state.items()}
            for state in _readings(tensors)
        )
        return self._without_linear(max(readings, key=self.matches))

    def _without_linear(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without linear layers that the network does not have."""
        layers = {name.rpartition(".")[0] for name in tensors.keys() - self.tensors.keys()}
        linear = {
            layer
            for layer in layers
            if getattr(tensors.get(f"{layer}.weight"), "ndim", 0) == 2
            and f"{layer}.running_mean" not in tensors  # banks of a batch norm have two axes, too
        }
        return {n: tensor for n, tensor in tensors.items() if n.rpartition(".")[0] not in linear}

    def has_banks(self, tensors: dict[str, Tensor]) -> bool:
        shared = self.tensors.keys() & tensors.keys()
        return any(self._is_banked(n, tensors[n]) and tensors[n].shape[0] > 1 for n in shared)

    def fit(
        self, file: WeightFile, tensors: dict[str, Tensor], taken: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and value of what is to be copied.

        Args:
            file: for its resolutions, and for what to say of it.
            tensors: of the file, by our names.
            taken: names to leave out on both sides.
        """
        self._refuse_misfits(file, tensors, taken)
        for name in self.tensors.keys() & tensors.keys() - taken:
            tensor = tensors[name].to(self.tensors[name].dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"checkpoint {file.path}: {name} holds values that are not finite")
            yield name, self._banks(file, tensor) if self._is_banked(name, tensor) else tensor

    def _banks(self, file: WeightFile, tensor: Tensor) -> Tensor:
        """[B, C] for the banks here, of [B', C] for those of the file."""
        sizes = self.model.resolutions[:1] if self.model.bn == "shared" else self.model.resolutions
        if tensor.shape[0] == 1:
            return tensor.expand(len(sizes), *tensor.shape[1:])
        if file.resolutions is None or tensor.shape[0] != len(file.resolutions):
            raise ValueError(
                f"checkpoint {file.path} has {tensor.shape[0]} batch-norm banks and does not say "
                f"of which sizes: read it with rsfast.load_pretrained(model, path, resolutions)"
            )
        rows = []
        for size in sizes:
            mixture = bn_mixture(file.resolutions, size)
            if not tensor.is_floating_point():  # a counter
                mixture = ((mixture[0][0], 1),)
            rows.append(sum((tensor[bank] * share for bank, share in mixture), start=tensor[0] * 0))
        return torch.stack(rows)

    def _fits(self, name: str, tensor: Tensor) -> bool:
        own = self.tensors[name].shape
        plain = self._is_norm(name) and tensor.shape == own[1:]
        return tensor.shape == own or plain or self._is_banked(name, tensor)

    def _is_norm(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._norms

    def _is_banked(self, name: str, tensor: Tensor) -> bool:
        own = self.tensors[name].shape
        return self._is_norm(name) and tensor.dim() == len(own) and tensor.shape[1:] == own[1:]

    def _refuse_misfits(
        self, file: WeightFile, tensors: dict[str, Tensor], taken: set[str]
    ) -> None:
        ours, theirs = self.tensors.keys() - taken, tensors.keys() - taken
        shared = ours & theirs
        # Files of PyTorch before 0.4.1, torchvision's among them, have no counters.
        missing = sorted(n for n in ours - theirs if not n.endswith(f".{_COUNTER}"))
        odd = sorted(n for n in shared if not self._fits(n, tensors[n]))
        faults = [
            *_listed("missing in it", missing),
            *_listed("unknown here", sorted(theirs - ours)),
            *_listed(
                "of another shape",
                [f"{n} {_shape(tensors[n])} for {_shape(self.tensors[n])}" for n in odd],
            ),
        ]
        if not faults:
            return
        name = self.model.arch or type(self.model.network).__name__
        if shared and len(odd) < len(shared):
            self._refuse_other_bits(file, tensors)
        what = f"does not fit {name}: {'; '.join(faults)}"
        if not shared or len(odd) == len(shared):
            what = f"is not of {name}: no tensor of it has a name and a shape of that network, "
            what += f"its first is {next(iter(tensors), None)!r}"
        raise ValueError(f"checkpoint {file.path} {what}{self._hint(file)}")

    def _refuse_other_bits(self, file: WeightFile, tensors: dict[str, Tensor]) -> None:
        """Of quantised networks: their bases are of their bits, and make no sense without them."""
        try:
            check_state(self.model.network, tensors)
        except ValueError as error:
            raise ValueError(
                f"checkpoint {file.path} does not fit: {error}{self._hint(file)}"
            ) from error

    def _hint(self, file: WeightFile) -> str:
        bare = list(without_prefixes(file.tensors))
        guess = next((arch for state in bare if (arch := looks_like(state))), None)
        if file.arch not in (None, self.model.arch):
            return f"; the file says that it is of {file.arch}"
        if guess is not None and guess != self.model.arch:
            named = f"a {guess}" if self._trunk else f"--arch {guess}"
            return f"; its keys look like {named}"
        return ""


def _without_other_classifier(
    target: _Target, tensors: dict[str, Tensor]
) -> tuple[set[str], int | None]:
    """Names to leave out because the classifier is for other classes, and the file's class count.

    0 stands for a file that ends in front of the classifier, and None for one whose classifier is
    taken over.
    """
    path = target.classifier
    names = {n for n in target.tensors if path is not None and n.startswith(f"{path}.")}
    if not names:
        return set(), None
    if not names & tensors.keys():
        # Another name for the classifier is a fault, which the unknown tensor shows.
        return (names, 0) if not tensors.keys() - target.tensors.keys() else (set(), None)
    weight, own = tensors.get(f"{path}.weight"), target.tensors[f"{path}.weight"]
    if weight is None or weight.shape[1:] != own.shape[1:] or weight.shape[0] == own.shape[0]:
        return set(), None
    return names, weight.shape[0]


def _about_banks(model: RSNet, resolutions: Sequence[int] | None) -> str:
    if resolutions is None or len(resolutions) == 1:
        count = 1 if model.bn == "shared" else len(model.resolutions)
        return f"its one batch norm was copied into {count} banks"
    own = model.resolutions[:1] if model.bn == "shared" else model.resolutions
    parts = []
    for size in own:
        mixture = bn_mixture(resolutions, size)
        parts.append(f"{size} from {' and '.join(str(resolutions[bank]) for bank, _ in mixture)}")
    return f"its batch-norm banks were taken by resolution: {', '.join(parts)}"


def _about_classifier(target: _Target, classes: int | None) -> str:
    own = target.model.num_classes
    if classes is None:
        return f"its classifier of {own} classes was taken over"
    there = f"is for {classes} classes" if classes else "is not in the file"
    return f"its classifier {there}, a fresh one for {own} takes its place"


def _warnings(
    model: RSNet, file: WeightFile, classes: int | None, own: Normalization | None
) -> Iterator[str]:
    if own is not None:
        yield from _warnings_of_images(model, file, own)
    ours, theirs = model.class_names, file.class_names
    if classes is None and ours is not None and theirs is not None and ours != theirs:
        yield f"{file.path} has as many classes as this network, and other ones: {theirs[:_SHOWN]}"


def _warnings_of_images(model: RSNet, file: WeightFile, own: Normalization) -> Iterator[str]:
    """On images that are normalised in another way than the weights expect, or perhaps so."""
    if file.normalization is not None and not _alike(file.normalization, own):
        (mean, std), (own_mean, own_std) = file.normalization, own
        yield (
            f"{file.path} expects images with mean {mean} and deviation {std} taken out, this "
            f"network gets them with {own_mean} and {own_std}: see --normalize"
        )
    elif file.normalization is None and own == ((0.0,) * 3, (1.0,) * 3):
        yield (
            f"{file.path} does not say how its images were normalised, and this network gets plain "
            f"[0, 1]: torchvision's weights expect --normalize imagenet, timm's mostly"
        )
    if model.arch in _AUXILIARY:
        yield (
            f"torchvision's published weights of {model.arch} expect images with mean 0.5 and "
            f"deviation 0.5 taken out, which --normalize cannot do: if {file.path} is of them, the "
            f"first epochs have to make up for it"
        )


def _alike(one: Normalization, other: Normalization) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < 1e-3 for a, b in pairs)


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > _SHOWN else ""
    count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    return [f"{count} {what} ({', '.join(names[:_SHOWN])}{more})"]


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
