"""The networks: sizes, initialisation, and equality with a list of tensors and nn.BatchNorm2d."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench.rivals.authors import AuthorsNet, authors_loss
from rsfast import Pyramid, create_model
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import official
from rsfast.models.deploy import multiply_adds
from rsfast.pyramid import SwitchableBatchNorm2d
from rsfast.pyramid.spatial import _MaxPool

RESOLUTIONS = (64, 48, 32)


def make_images(num_images: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, 3)
    return [torch.randn(*shape, r, r, generator=generator, dtype=dtype) for r in RESOLUTIONS]


def make_twins(arch: str) -> tuple[AuthorsNet, torch.nn.Module]:
    """A network of the authors' kind and ours, with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = AuthorsNet(arch, len(RESOLUTIONS), num_classes=7).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    # Ours loads into float32 parameters: both networks get the rounded values.
    theirs.float().double()
    return theirs, official.from_state_dict(theirs.state_dict(), RESOLUTIONS).double()


@pytest.mark.parametrize(
    ("arch", "one", "five"),
    [
        ("resnet18", 11_689_512, 11_727_917),
        ("resnet34", 21_797_672, None),
        ("resnet50", 25_557_032, 25_769_517),
        ("resnet101", 44_549_160, None),
        ("resnet152", 60_192_808, None),
        ("resnext50_32x4d", 25_028_904, None),
        ("resnext101_32x8d", 88_791_336, None),
        ("mobilenetv2", 3_504_872, 3_641_325),
    ],
)
def test_parameter_counts_are_the_papers(arch: str, one: int, five: int | None) -> None:
    def count(resolutions: tuple[int, ...]) -> int:
        with torch.device("meta"):
            model = create_model(arch, resolutions)
        return sum(param.numel() for param in model.parameters())

    assert count((224,)) == one
    if five is not None:  # with one ensemble score per resolution
        assert count((224, 192, 160, 128, 96)) + 5 == five


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("resnet18", (1814.1, 1332.9, 925.8, 592.7, 333.6)),
        ("resnet50", (4089.2, 3004.8, 2087.3, 1336.6, 752.7)),
        ("mobilenetv2", (300.8, 221.3, 154.1, 99.1, 56.3)),
    ],
)
def test_multiply_adds_are_the_papers(arch: str, millions: tuple[float, ...]) -> None:
    model = create_model(arch)
    counted = [multiply_adds(model.at(r), r) / 1e6 for r in model.resolutions]
    assert counted == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2"])
def test_training_step_equals_a_list_of_tensors_with_private_batch_norm(arch: str) -> None:
    theirs, ours = make_twins(arch)
    theirs.train()
    ours.train()
    images, labels = make_images(), torch.tensor([0, 3, 6, 3])
    loss = MultiResolutionDistillation(len(RESOLUTIONS)).double()

    their_logits = theirs(images)
    their_total = authors_loss(their_logits, labels, theirs.alpha)
    their_total.backward()
    our_logits = ours(Pyramid.pack(images))
    our_total = loss(our_logits, labels).total
    our_total.backward()

    torch.testing.assert_close(our_logits, torch.stack(their_logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(our_total, their_total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.alpha.grad, theirs.alpha.grad, rtol=1e-9, atol=1e-12)
    their_grads = {key: param.grad for key, param in theirs.named_parameters()}
    our_grads = {key: param.grad for key, param in ours.named_parameters()}
    their_buffers, our_buffers = dict(theirs.named_buffers()), dict(ours.named_buffers())
    for their_key, our_key, bank in official.key_map(ours):
        is_buffer = our_key in our_buffers
        exact = (their_buffers if is_buffer else their_grads)[their_key]
        found = (our_buffers if is_buffer else our_grads)[our_key]
        found = found if bank is None else found[bank]
        # Against the largest entry: single ones may be what is left of large sums.
        error = (found - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
        assert error < 1e-8, f"{their_key} is off by {error:.1e}"


def test_a_sequence_of_tensors_is_as_good_as_a_pyramid() -> None:
    model = create_model("resnet18", RESOLUTIONS, 7).eval()
    images = make_images(2, torch.float32)
    assert torch.equal(model(images), model(Pyramid.pack(images)))


def test_training_at_one_resolution_leaves_the_other_sets_alone() -> None:
    model = create_model("resnet18", RESOLUTIONS, 7).train()
    norm = model.batch_norms()[0]
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    model([make_images(2, torch.float32)[1]]).sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        after = norm.state_dict()[name]
        assert not torch.equal(after[1], before[name][1])
        assert torch.equal(after[[0, 2]], before[name][[0, 2]])
    assert norm.weight.grad[1].any()
    assert not norm.weight.grad[[0, 2]].any()


def test_shared_batch_norm_has_one_set_that_every_level_moves() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", RESOLUTIONS, 7, bn="shared").train()
    single = create_model("resnet18", (64,), 7)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in single.parameters())
    images = make_images(2, torch.float32)
    model(images)
    norm = model.batch_norms()[0]
    assert norm.num_batches_tracked.tolist() == [3]
    reference = torch.nn.BatchNorm2d(64)
    for image in images:
        reference(torch.nn.functional.conv2d(image, model.network.conv1.weight, None, 2, 3))
    torch.testing.assert_close(norm.running_mean[0], reference.running_mean)
    torch.testing.assert_close(norm.running_var[0], reference.running_var)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
def test_initialisation_is_the_papers(arch: str) -> None:
    torch.manual_seed(0)
    model = create_model(arch)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = math.prod(module.kernel_size) * module.out_channels
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        if isinstance(module, SwitchableBatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    (head,) = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weight, bias = head.weight, head.bias
    if arch == "mobilenetv2":
        assert weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not bias.any()
    else:
        bound = 1 / math.sqrt(weight.shape[1])
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert 0.5 * bound < bias.abs().max().item() <= bound


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
def test_one_resolution_trains_like_an_ordinary_network(arch: str) -> None:
    torch.manual_seed(0)
    model = create_model(arch, (32,), 7).double()
    plain = model.at(32).train()
    loss = MultiResolutionDistillation(1, mode="none").double()
    image, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 7
    ours = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        ours.zero_grad()
        terms = loss(model([image]), labels)
        terms.total.backward()
        ours.step()
        theirs.zero_grad()
        exact = torch.nn.functional.cross_entropy(plain(image), labels)
        exact.backward()
        theirs.step()
        torch.testing.assert_close(terms.ce, exact, rtol=1e-9, atol=1e-9)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.eval()([images])[0], plain.eval()(images))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
def test_channels_of_zeros_behind_the_colours_change_nothing(arch: str) -> None:
    torch.manual_seed(0)
    model = create_model(arch, RESOLUTIONS, 7).double().eval()
    plain = Pyramid.pack(make_images(2))
    padded = plain.with_rows(torch.nn.functional.pad(plain.rows, (0, 1)))
    results = []
    for images in (plain, padded):
        logits = model(images)
        (grad,) = torch.autograd.grad(logits.square().sum(), next(model.parameters()))
        results.append((logits, grad))
    for value, padded_value in zip(*results, strict=True):
        torch.testing.assert_close(value, padded_value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "vgg16"}, "arch must be one of .* got 'vgg16'"),
        ({"resolutions": (32, 64)}, "strictly descending"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"bn": "none"}, "bn must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"arch": "resnet18", **arguments})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(1, 3, 40, 40)], "images of 40x40 pixels have no batch-norm bank"),
        ([torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64)], "descending order"),
        ([torch.zeros(1, 1, 64, 64)], "images must have 3 channels"),
        ([torch.zeros(1, 4, 64, 64)], "images must have 3 channels"),
        (Pyramid.pack([torch.zeros(1, 3, 40, 40)], banks=(3,)), r"banks must be in \[0, 3\)"),
    ],
    ids=["untrained size", "ascending", "grey", "with alpha", "bank"],
)
def test_bad_images_are_named(images: Pyramid | list[torch.Tensor], message: str) -> None:
    model = create_model("resnet18", RESOLUTIONS, 7)
    with pytest.raises(ValueError, match=message):
        model(images)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 1), (2, 2), (1, 1)], ids=str)
def test_max_pooling_in_order_is_max_pooling(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64).relu()  # with ties
    level.requires_grad_()
    ours, exact = _MaxPool.apply(level, (3, 3), (2, 2), (1, 1)), F.max_pool2d(level, 3, 2, 1)
    assert torch.equal(ours, exact)
    dy = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad(y, level, dy)[0] for y in (ours, exact)]
    torch.testing.assert_close(*grads)
