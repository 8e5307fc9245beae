import pytest
import torch
import torchvision
from torch.utils._pytree import tree_leaves

from benchmarks.core.reference import with_plain_loops
from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import ClassifierConfig, ResNet, build_classifier
from revdeq_lightning.models.build import SolverConfig, build_image_classifier
from tests.helpers.equilibrium import relative_error

SIZES = {
    "stages": {"channels": [16, 32], "widths": [1, 2]},
    "joint": {"channels": [16, 32, 48]},
    "paper_single": {"channels": [32]},
    "paper_stages": {"channels": [16, 32, 16], "widths": [1, 3, 1]},
}
architectures = pytest.mark.parametrize("architecture", SIZES)


def make(architecture, solver=None, adjoint=None, seed=0, **settings):
    torch.manual_seed(seed)
    config = ClassifierConfig(**{"num_classes": 10, "architecture": architecture} | SIZES[architecture] | settings)
    model = build_classifier(
        config, solver or MomentumSolver(max_steps=3), adjoint or ReversibleAdjoint(mismatch="raise")
    )
    with torch.no_grad():  # not the zeros and ones of the start, at which parts of f do nothing
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(size=16, num=4, channels=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num, channels, size, size, generator=generator)
    return images, torch.randint(0, 10, (num,), generator=generator)


def gradients(model, images, labels):
    output = model(images)
    torch.nn.functional.cross_entropy(output.logits_BV, labels).backward()
    return output, [p.grad for p in model.parameters()]


@architectures
@pytest.mark.parametrize(
    "solver", [ReversibleSolver(beta=0.8, max_steps=4), MomentumSolver(max_steps=6)], ids=["reversible", "momentum"]
)
def test_gradient_of_the_whole_classifier_matches_bptt(architecture, solver):
    images, labels = batch()
    output, ours = gradients(make(architecture, solver), images, labels)
    _, theirs = gradients(with_plain_loops(make(architecture, solver)), images, labels)
    assert all(int(stats.reconstruction_mismatch) == 0 for stats in output.stats)
    norm = torch.cat([g.flatten() for g in theirs]).norm()
    error = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm()
    assert error <= 1e-5 * norm
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= 1e-4  # a single weight may cancel to a thousandth of the others


@architectures
def test_evaluations_are_those_of_every_stage(architecture):
    output, _ = gradients(make(architecture, MomentumSolver(max_steps=3)), *batch())
    num_solves = 1 if architecture in ("joint", "paper_single") else len(SIZES[architecture]["channels"])
    assert [stats.forward_nfe for stats in output.stats] == [3] * num_solves
    assert [stats.backward_nfe for stats in output.stats] == [3] * num_solves
    if architecture == "stages":
        output, _ = gradients(make("stages", steps=[1, 4]), *batch())
        assert [stats.forward_nfe for stats in output.stats] == [1, 4]


@pytest.mark.parametrize("architecture", ["stages", "joint"])
@pytest.mark.parametrize(("size", "stride"), [(27, 1), (32, 2), (224, 4)])
def test_one_constructor_takes_images_of_any_size_channels_and_classes(architecture, size, stride):
    model = make(architecture, stem_stride=stride, num_classes=101, num_channels=1).eval()
    logits = model(torch.randn(1, 1, size, size)).logits_BV
    assert logits.shape == (1, 101)
    if architecture == "stages":
        assert [layer.f.conv1.out_channels for layer in model.equilibria] == [16, 2 * 32]
    assert logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["stages", "joint"])
def test_channels_last_gives_the_same_gradients(architecture):
    images, labels = batch()
    _, plain = gradients(make(architecture), images, labels)
    model = make(architecture).to(memory_format=torch.channels_last)
    output, ours = gradients(model, images.to(memory_format=torch.channels_last), labels)
    assert all(int(stats.reconstruction_mismatch) == 0 for stats in output.stats)
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) <= 1e-4  # other kernels sum in another order


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("stages", {"block": "paper"}), ("joint", {"block": "paper"}), ("joint", {"group_size": 0})],
)
def test_gradient_of_other_blocks_matches_bptt(architecture, settings):
    images, labels = batch()
    _, ours = gradients(make(architecture, **settings), images, labels)
    _, theirs = gradients(with_plain_loops(make(architecture, **settings)), images, labels)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= 1e-4  # the smallest of many; the whole gradient is compared above


def test_group_size_0_normalises_all_channels_of_a_sample():
    block = make("stages", group_size=0).equilibria[0].f
    h = 3 + 2 * torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        block.norm1.weight.fill_(1.0), block.norm1.bias.zero_()
    expected = torch.nn.functional.layer_norm(h, h.shape[1:])
    torch.testing.assert_close(block.norm1(h), expected)


def test_stochastic_depth_leaves_samples_past_an_equilibrium():
    model = make("stages", stochastic_depth=0.5, channels=[16], widths=[1])
    images, _ = batch(num=64)
    with torch.no_grad():
        x = model.stem(images)
        z = model.equilibria[0](x).value
        model.final = torch.nn.Identity()
        features = model.features(images)[0]
    past, kept = x.mean((2, 3)), (x + 2 * z).mean((2, 3))  # survivors are scaled, so that the mean stays
    is_past = torch.isclose(features, past, atol=1e-6).all(1)
    assert 10 < is_past.sum() < 54
    assert torch.equal(is_past, ~torch.isclose(features, kept, atol=1e-6).all(1))
    same, no_drop = (make("stages", stochastic_depth=p).eval()(images).logits_BV for p in (0.5, 0.0))
    assert torch.equal(same, no_drop)


@pytest.mark.parametrize("architecture", ["stages", "joint"])
def test_peak_memory_grows_by_digits_alone_and_is_below_stored_bptt_from_two_steps_on(architecture):
    images, labels = batch(size=16, num=8)

    def peak(num_steps, adjoint):
        model = make(architecture, ReversibleSolver(beta=0.8, max_steps=num_steps), adjoint)
        return peak_tensor_bytes(lambda: gradients(model, images, labels))

    two, many = peak(2, ReversibleAdjoint()), peak(8, ReversibleAdjoint())
    assert two < peak(2, BackpropAdjoint())
    sizes = []
    model = make(architecture, ReversibleSolver(beta=0.8, max_steps=2))
    for layer in model.modules():
        if isinstance(layer, EquilibriumLayer):
            layer.register_forward_hook(lambda _, x, y: sizes.extend(z.numel() for z in tree_leaves(y.value)))
    model(images)
    digits = 2 * (8 - 2) * 3 / 8 * sum(sizes)  # bytes: 3 bits in radix 5
    assert many <= 1.01 * two + digits


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"shape \(B, 3, H, W\), got \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        make("stages")(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "other"}, "architecture must be one of"),
        ({"channels": []}, r"got \[\]"),
        ({"channels": [24]}, r"above 16 must be multiples.*\[24\]"),
        ({"channels": [0]}, "at least 1, got 0"),
        ({"widths": [1]}, "one entry per stage"),
        ({"stem_stride": 3}, "got 3"),
        ({"dropout": 1.0}, "got 1.0"),
        ({"architecture": "paper_single"}, "one stage"),
        ({"architecture": "joint", "steps": [1, 2, 3]}, "one solve"),
        ({"architecture": "paper_stages", "dropout": 0.1}, "dropout belongs to architecture 'stages' or .*got 0.1"),
        ({"architecture": "paper_stages", "stem_stride": 2}, "stem_stride belongs to"),
        ({"architecture": "joint", "stochastic_depth": 0.1}, "stochastic_depth belongs to architecture 'stages'"),
        ({"architecture": "resnet", "steps": [2, 2, 2]}, "steps belongs to .* for 'resnet'"),
        ({"architecture": "resnet", "group_size": 0}, "group_size belongs to .* got 0 for 'resnet'"),
        ({"block": "paper", "group_size": 8}, "group_size belongs to block 'modern', got 8"),
        ({"block": "other"}, "got 'other'"),
        ({"group_size": -1}, "got -1"),
        ({"group_size": 48, "channels": [64]}, r"multiples of it.*\[64\]"),
        ({"stochastic_depth": 1.0}, "got 1.0"),
        ({"blocks": [1, 1, 1]}, "belongs to architecture 'resnet'"),
        ({"num_classes": 0}, "got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**{"num_classes": 10} | settings)


def test_steps_of_the_stages_and_of_the_solver_are_not_both_given():
    with pytest.raises(ValueError, match=r"no effect without stages that share it \(steps=\[2\]\), got 9"):
        build_image_classifier(ClassifierConfig(3, channels=[16], steps=[2]), SolverConfig(max_steps=9))


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_resnet_18_is_torchvisions_with_another_stem(num_classes):
    """Weight for weight in the order of the modules, and the same logits: 11,173,962 and 11,689,512 parameters."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=num_classes)
    if num_classes == 10:
        theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        theirs.conv1.stride = (4, 4)
    theirs.maxpool = torch.nn.Identity()
    config = ClassifierConfig(
        num_classes=num_classes,
        architecture="resnet",
        channels=[64, 128, 256, 512],
        stem_stride=1 if num_classes == 10 else 4,
    )
    ours = ResNet(config)
    rest = iter(theirs.state_dict().values())
    ours.load_state_dict({name: next(rest) for name in pair_names(ours)})
    assert next(rest, None) is None
    assert sum(p.numel() for p in ours.parameters()) == (11_173_962 if num_classes == 10 else 11_689_512)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images).logits_BV, theirs.eval()(images))


def pair_names(resnet):
    """Our names in the order of torchvision's: conv1, norm1, conv2, norm2, shortcut of each block."""
    order = {"stem": 0, "blocks": 1, "head": 2}
    parts = {"conv1": 0, "norm1": 1, "conv2": 2, "norm2": 3, "shortcut": 4}

    def key(item):
        index, name = item
        first, *others = name.split(".")
        return (order[first], int(others[0]), parts[others[1]], index) if first == "blocks" else (order[first], index)

    return [name for _, name in sorted(enumerate(resnet.state_dict()), key=key)]
