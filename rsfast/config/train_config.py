"""The settings of a run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from rsfast.config.rules import check, check_task_settings, setting
from rsfast.config.texts import checkpoint_interval, operations_of, profiled_steps
from rsfast.data.augment import Augment
from rsfast.data.decoding import TOO_MANY_WORKERS, check_decoder_load
from rsfast.data.loader import BACKENDS, NORMALIZATIONS
from rsfast.data.patterns import check_archives
from rsfast.data.picking import check_levels
from rsfast.data.pixel_plan import check_scale
from rsfast.data.plan import CROP_MODES, FLIP_MODES, VAL_CROPS
from rsfast.data.sources import check_sources
from rsfast.engine import PRECISIONS
from rsfast.engine.optim import DECAY_MODES, OPTIMIZERS, SCHEDULES
from rsfast.files.orientation import EXIF_MODES
from rsfast.files.pictures import LEVEL_MODES
from rsfast.files.task_names import TASKS
from rsfast.kernels import BACKENDS as KERNEL_BACKENDS
from rsfast.kernels import DISTILL_MODES
from rsfast.models.lq import FULL_PRECISION
from rsfast.models.registry import (
    ARCHITECTURES,
    bits_of,
    check_arch,
    check_task,
    check_zero_init,
)
from rsfast.models.rsnet import BN_MODES
from rsfast.pyramid import check_resolutions

__all__ = ["TrainConfig"]

# What the help lists: networks that come with rsfast, and forms that check_arch knows.
_ARCHS = (*ARCHITECTURES, "torchvision/NAME", "timm/NAME", "MODULE:FUNCTION")
_GAMMA = 0.1  # of the schedule step


def _check_probability(share: float) -> None:
    Augment(random_erasing=share)


def _check_milestones(epochs: tuple[int, ...]) -> None:
    if list(epochs) != sorted({*epochs}) or any(epoch < 1 for epoch in epochs):
        raise ValueError(f"milestones must be epochs from 1, strictly ascending, got {epochs}")


def _check_factor(factor: float) -> None:
    if not factor > 0.0:
        raise ValueError(
            f"decoder_lr must be above 0, got {factor}: --freeze keeps parts as they are"
        )


def _check_area(area: tuple[float, ...]) -> None:
    if len(area) != 2 or not 0.0 < area[0] <= area[1] <= 1.0:
        raise ValueError(f"crop_area must be a range within (0, 1], got {area}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything a training run depends on."""

    arch: str = setting("resnet50", forms=_ARCHS, check=check_arch)
    """network, and the recipe that the other settings start from; networks of the packages
    torchvision and timm and of a function of yours, called with num_classes, have none"""
    task: str = setting(None, choices=TASKS)
    """what the network is for; by default what a network of rsfast is for, and classification for
    all others"""
    data: str | None = setting(None, on_resume="freely")
    """folder with train/ and val/, which hold one sub-folder per class, tar shards or Parquet
    files (segmentation: images, with their masks in trainannot/ and valannot/); without it the
    built-in set is used"""
    train_data: str | None = setting(
        None, check=check_archives, on_resume="freely", only="classification"
    )
    """training images in place of data's: a pattern of shards or Parquet files, such as
    "/data/train-{0000..1023}.tar" or "/data/train-*.parquet\""""
    val_data: str | None = setting(
        None, check=check_archives, on_resume="freely", only="classification"
    )
    """validation images in place of data's, likewise"""
    val_list: str | None = setting(None, on_resume="freely", only="classification")
    """labels of a data/val without class folders: lines of "file label", or a label per sorted
    file; a label is a class's name, or its number from 0"""
    output: str | None = setting(None, on_resume="freely")
    """run folder; by default runs/<arch>, with _ for / and :, or runs/resnet18_w2a32 and the like
    for quantised networks"""
    pretrained: str | None = None
    """file of weights to start from, of torchvision, timm, the authors' code or rsfast; each
    batch-norm bank starts as the file's batch norm"""
    continue_from: str | None = None
    """folder of a run that has ended (or a checkpoint of it) to go on from, as a run of its own
    with more epochs or other settings; arch, task, bits, resolutions, bn, copies and classes
    stay"""
    calibrate_first: int = setting(0, at_least=0)
    """training batches, of one epoch at most, on which the statistics of pretrained weights are
    estimated anew, resolution by resolution, before the first step"""
    freeze: tuple[str, ...] | None = None
    """parts that are not trained: classifier, backbone, stem, batch-norms, names of modules such as
    layer1, or all-but-PART; batch norms go on to track their statistics"""
    resolutions: tuple[int, ...] = setting((224, 192, 160, 128, 96), check=check_resolutions)
    """trained resolutions in pixels, strictly descending"""
    distill: str = setting("full", choices=DISTILL_MODES)
    """which resolutions teach which"""
    bn: str = setting("private", choices=BN_MODES)
    """one batch-norm bank per resolution, or one for all"""
    weight_bits: int | None = None
    """of the weights of a quantised network (resnet18_lq, resnet50_lq), 1 to 4; by default 2"""
    activation_bits: int | None = None
    """of its activations, 1 to 4, or 32 for full precision, the default"""
    fix_activation_basis: bool = False
    """let the largest resolution alone move the levels of quantised activations"""
    zero_init_residual: bool | None = None
    """let the last batch norm of each residual block begin at 0, so that blocks begin as
    identities, or at 1 (ResNets with activations in full precision); by default at 0 in quantised
    ones, as the authors' do, and at 1 in others"""
    sync_bn: bool = False
    """batch statistics over all ranks, set by set, instead of each rank's own"""
    label_smoothing: float = setting(0.0, at_least=0, below=1)
    """of the cross entropies, in [0, 1)"""
    crop: str = setting("single", choices=CROP_MODES, only="classification")
    """one random window per image, or one for each of its levels"""
    copies: int = setting(1, at_least=1, only="classification")
    """levels of each resolution, which differ in their windows if crop is multi; they share a
    batch-norm bank"""
    flip: str = setting("shared", choices=FLIP_MODES)
    """one random flip per image, one for each of its levels, or none"""
    levels: str = setting("resize", choices=LEVEL_MODES, only="classification")
    """resize each resolution from the image, or the largest only, and pick the pixels of smaller
    ones from it (nearest), in training and validation, as the authors' quantised program does; goes
    with crop single and flip shared or none"""
    picked_from: int | None = setting(None, only="classification")
    """with levels nearest, the resolution that smaller ones are picked from; by default the largest
    trained one"""
    crop_area: tuple[float, float] = setting((0.08, 1.0), check=_check_area, only="classification")
    """range of the window's share of the image's area"""
    mixup: float = setting(0.0, at_least=0, only="classification")
    """alpha of Beta(alpha, alpha), of which the share of an image in its mixture with another one
    of the batch is drawn; 0 for no mixtures"""
    cutmix: float = setting(0.0, at_least=0, only="classification")
    """alpha of Beta(alpha, alpha), of which the share of an image that a box of another one leaves
    visible is drawn; 0 for no boxes; with mixup, each image gets one of the two"""
    rand_augment: str | None = setting(None, check=operations_of, only="classification")
    """operations N and magnitude M (0 to 30) of RandAugment as N:M, such as 2:9; one draw for all
    resolutions; by default none"""
    random_erasing: float = setting(0.0, check=_check_probability, only="classification")
    """probability that a rectangle of an image is erased, the same at all its resolutions"""
    lighting: float = setting(0.0, at_least=0, only="classification")
    """standard deviation of AlexNet's colour noise, one draw for all resolutions; the authors'
    quantised program has 0.1"""
    scale: tuple[float, float] = setting((0.5, 2.0), check=check_scale, only="segmentation")
    """range of the scale of a training image (segmentation): at 2 the window is half as wide and
    high as the image, at 0.5 twice, with what is beyond the image left out of the loss"""
    ignore_label: int = setting(255, at_least=0, below=256, only="segmentation")
    """value of the masks' pixels that count neither in the loss nor in the scores (segmentation)"""
    val_crop: str = setting("center", choices=VAL_CROPS, only="classification")
    """resize to r / 0.875 and cut the centre, or resize straight to r"""
    exif: str = setting("ignore", choices=EXIF_MODES)
    """leave images as they are stored, or turn them as their EXIF says"""
    normalize: str = setting("imagenet", choices=tuple(NORMALIZATIONS))
    """subtract mean and divide by deviation, or feed [0, 1]"""
    batch_size: int = setting(256, at_least=1, on_resume="at an epoch")
    """images per GPU (per process on CPUs)"""
    epochs: int = setting(120, at_least=1)
    """passes over the data"""
    steps_per_epoch: int = setting(0, at_least=0, on_resume="at an epoch")
    """cut epochs short after so many steps; 0 for whole ones"""
    lr: float = setting(0.1, at_least=0)
    """highest learning rate"""
    schedule: str = setting("cosine", choices=SCHEDULES)
    """cosine to 0 per step, poly: the share of steps that is left to the power of 0.9, per step, or
    steps down after the epochs of milestones"""
    milestones: tuple[int, ...] = setting((), check=_check_milestones)
    """epochs after which the schedule step multiplies the rate by gamma, ascending"""
    gamma: float = setting(_GAMMA, at_least=0, below=1)
    """factor of the rate at each of the milestones"""
    decoder_lr: float = setting(1.0, check=_check_factor, only="segmentation")
    """factor of lr for what is not of the network's trunk or backbone (segmentation)"""
    scale_lr: bool = setting(False, only="classification")
    """multiply lr by (images per step over all ranks) / 256; goes with warmup_epochs"""
    warmup_epochs: float = setting(0.0, at_least=0)
    """epochs of linear warm-up"""
    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """sgd of PyTorch (fused on a GPU), or that of NVIDIA Apex where it is installed"""
    momentum: float = setting(0.9, at_least=0, below=1)
    """of SGD"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = setting(1e-4, at_least=0)
    """L2 factor"""
    decay: str = setting("all", choices=DECAY_MODES)
    """decay all parameters, or only the weights of convolutions and classifier"""
    ema_decay: float = setting(0.0, at_least=0, below=1)
    """per-step decay of averaged weights, whose accuracy then chooses the best epoch; 0 for none"""
    ema_warmup: bool = True
    """let the decay grow with the steps t, min(ema_decay, (1 + t) / (10 + t)), so that a short
    run's averages are not of weights from before training"""
    precision: str | None = setting(None, choices=tuple(PRECISIONS))
    """autocast type; by default bf16 on a GPU and fp32 on a CPU"""
    loader: str = setting("dali", choices=BACKENDS, on_resume="at an epoch")
    """data loader; synthetic repeats one random batch"""
    strict: bool = setting(False, on_resume="freely")
    """refuse a data set with unreadable images instead of leaving them out"""
    tolerate_truncated: bool = setting(False, on_resume="freely")
    """use the images that the last check found to be cut off, as far as they can be decoded"""
    workers: int | None = setting(None, at_least=0, below=TOO_MANY_WORKERS, on_resume="freely")
    """loader threads (dali) or processes (pil) per rank; by default its share of the cores that it
    may run on, at most 32"""
    hw_decoder_load: float | None = setting(None, check=check_decoder_load, on_resume="freely")
    """share of the JPEG images that the GPU's own JPEG decoder takes (dali); by default 0.65, or
    0.9 with fewer than 8 workers"""
    dont_use_mmap: bool = setting(False, on_resume="freely")
    """read image files plainly instead of mapping them into memory (dali): better on most network
    file systems"""
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), on_resume="freely")
    """auto takes a GPU where there is one"""
    kernels: str = setting("auto", choices=("auto", *KERNEL_BACKENDS))
    """batch norm, pooling and loss in fused Triton kernels or in plain PyTorch; auto takes triton
    on a GPU; cuda is triton with batch norm in CUDA C++ (csrc/README.md), for bf16 and fp16, not
    timed yet"""
    graph: bool = setting(True, on_resume="freely")
    """replay the whole step as one CUDA graph; without effect on a CPU"""
    deterministic: bool = False
    """the same bits in every run on the same machine, at some cost in speed"""
    profile: str | None = setting(None, check=profiled_steps, on_resume="freely")
    """steps A:B (from A up to, but not including, B) that a profiler is told to record, and names
    of layers and phases for it"""
    checkpoint_every: str | None = setting(None, check=checkpoint_interval, on_resume="freely")
    """steps ("500") or minutes ("10m") between checkpoints, besides those after every epoch"""
    keep: int = setting(2, at_least=1, on_resume="freely")
    """checkpoints to keep: last.pt, last-1.pt, ..."""
    max_skipped: int = setting(20, at_least=1, on_resume="freely")
    """steps in a row that may be left out because loss or gradients are not finite"""
    seed: int = setting(0, at_least=0)
    """of weights, order and augmentation"""
    log_every: int = setting(50, at_least=1, on_resume="freely")
    """steps between log lines; the only moments that wait for the device"""
    resume: str | None = setting(None, on_resume="freely")
    """checkpoint to continue, or auto for the run folder's last whole one if it is there"""
    restart_epoch: bool = setting(False, on_resume="freely")
    """continue from the start of the checkpoint's epoch, which allows another number of processes,
    batch size, loader or set of images"""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "task", check_task(self.arch, self.task))
        self._check_task()
        named = self.data, self.train_data, self.val_data, self.val_list
        check_sources(*named, both_splits=True)
        bits = bits_of(self.arch, self.weight_bits, self.activation_bits)
        check_zero_init(self.arch, bits, self.zero_init_residual)
        if self.fix_activation_basis and (bits is None or bits.activation == FULL_PRECISION):
            raise ValueError(
                "fix_activation_basis is of quantised activations, and there are none: add "
                "--activation-bits 2 to --arch resnet18_lq or resnet50_lq, or leave it away"
            )
        check_levels(self.levels, self.crop, self.flip)
        self._check_picked_from()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than the {self.epochs} epochs, "
                f"got {self.warmup_epochs}: --warmup-epochs takes others"
            )
        self._check_schedule()
        if self.calibrate_first and self.pretrained is None:
            raise ValueError(
                "calibrate_first needs pretrained weights, whose statistics it estimates: "
                "add --pretrained PATH"
            )
        if self.optimizer == "apex_sgd" and self.graph:
            raise ValueError(
                "optimizer apex_sgd takes its learning rate from the host, which a captured step "
                "cannot: add --no-graph"
            )
        if self.kernels == "cuda" and self.precision == "fp32":
            raise ValueError("kernels cuda needs precision bf16 or fp16, got fp32")
        if self.restart_epoch and self.resume is None:
            raise ValueError("restart_epoch needs a run to continue: add --resume auto")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0")

    def _check_task(self) -> None:
        check_task_settings(self, self.task)
        if self.task == "segmentation" and self.flip == "independent":
            raise ValueError(
                "flip must be shared or none for segmentation, where all resolutions are compared "
                "pixel by pixel, got independent"
            )

    def _check_picked_from(self) -> None:
        if self.picked_from is None:
            return
        if self.levels != "nearest":
            raise ValueError(
                f"picked_from is for levels nearest, and levels {self.levels} picks no pixels: add "
                f"--levels nearest, or leave picked_from away"
            )
        if self.picked_from < self.resolutions[0]:
            raise ValueError(
                f"picked_from must be at least {self.resolutions[0]}, the largest of the "
                f"resolutions, got {self.picked_from}"
            )

    def _check_schedule(self) -> None:
        if self.schedule == "step":
            if not self.milestones:
                raise ValueError(
                    "schedule step needs the epochs after which the rate falls: add --milestones, "
                    "such as --milestones 30 60 90"
                )
            if self.milestones[-1] >= self.epochs:
                raise ValueError(
                    f"milestones must be below the {self.epochs} epochs, got {self.milestones}: "
                    f"--milestones takes others"
                )
        elif self.milestones:
            raise ValueError(
                f"milestones are of the schedule step, got {self.milestones} for "
                f"{self.schedule}: add --schedule step, or leave them away (--milestones without "
                "numbers)"
            )
        elif self.gamma != _GAMMA:
            raise ValueError(
                f"gamma is of the schedule step, got {self.gamma} for {self.schedule}: add "
                "--schedule step and --milestones, or leave it away"
            )

    @property
    def augment(self) -> Augment:
        """What happens to training images beyond window and flip."""
        return Augment(
            mixup=self.mixup,
            cutmix=self.cutmix,
            rand_augment=operations_of(self.rand_augment),
            random_erasing=self.random_erasing,
            lighting=self.lighting,
        )

    @property
    def is_builtin(self) -> bool:
        """Whether the images are those of the built-in set."""
        named = self.data or self.train_data or self.val_data
        return not named and self.loader != "synthetic"

    @property
    def images(self) -> str:
        """Where the images are, in words."""
        if self.is_builtin:
            return "the built-in set"
        named = " and ".join(filter(None, (self.data, self.train_data, self.val_data)))
        return named or "the synthetic set"

    @property
    def folder(self) -> Path:
        """Where a run with these settings writes."""
        bits = bits_of(self.arch, self.weight_bits, self.activation_bits)
        name = re.sub("[/:]", "_", self.arch)
        if bits is not None:  # the two widths of a network are two networks
            name = f"{name.removesuffix('_lq')}_w{bits.weight}a{bits.activation}"
        return Path(self.output or f"runs/{name}")

    def to_toml(self) -> str:
        """A config file; settings that are None are left out."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return tomli_w.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
