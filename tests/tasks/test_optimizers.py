import copy
import math
import re

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from revdeq_lightning.tasks.optimizers import (
    MuonAdamW,
    OptimizerConfig,
    WindowedPlateau,
    build_optimizer,
    build_scheduler,
    group_parameters,
)
from tests.helpers.modules import Stranger, loader, make_model, trainer
from tests.helpers.runs import run, run_metrics, tiny_config


def muon(parameters):
    return MuonAdamW([{"params": list(parameters), "lr": 0.1, "momentum": 0.95, "weight_decay": 0.1}])


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["modern", "paper", "explicit"])
def test_every_parameter_is_in_exactly_one_group_and_muon_has_the_linear_maps_of_f(kind):
    model = make_model(kind)
    matrices, embeddings, readout, others = group_parameters(model)
    ids = [id(p) for p in (*matrices, *embeddings, *readout, *others)]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    inside = model.block if kind == "explicit" else model.equilibrium.f
    expected = {id(m.weight) for m in inside.modules() if isinstance(m, nn.Linear)}
    assert {id(p) for p in matrices} == expected
    assert [id(p) for p in readout] == [id(model.output_weight_VD)]
    assert {id(p) for p in embeddings} == {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


class EarlierOptimizer(torch.optim.Optimizer):
    """The optimizer of version 0.1.0.dev0 for optimizer=muon, less its Muon: two of PyTorch's kind that step as one."""

    def __init__(self, muon, adamw):
        self.members = muon, adamw
        super().__init__([{"params": []}], {})
        self.param_groups = [group for member in self.members for group in member.param_groups]
        self.state = {p: state for member in self.members for p, state in member.state.items()}


def test_it_steps_like_muon_and_pytorchs_adamw_alone_and_resumes_from_their_states():
    together, apart = make_model("modern"), make_model("modern")
    config = OptimizerConfig(
        optimizer="muon", lr=0.01, embedding_lr=0.03, muon_lr=0.1, weight_decay=0.1, readout_decay=0.2
    )
    joint = build_optimizer(together, config)
    matrices, embeddings, readout, others = group_parameters(apart)
    alone = muon(matrices)
    groups = [{"params": embeddings, "lr": 0.03}, {"params": readout, "weight_decay": 0.2}, {"params": others}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for seed in range(3):
        step(together, joint, seed)
        step(apart, alone, seed)
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))
    resumed = build_optimizer(apart, config)
    resumed.load_state_dict(copy.deepcopy(EarlierOptimizer(alone, adamw).state_dict()))
    for model, optimizer in ((together, joint), (apart, resumed)):
        step(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_in_float32_is_pytorchs_up_to_the_rounding_of_bfloat16(shape):
    models = [nn.Linear(shape[1], shape[0], bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0].weight.detach().clone()
    ours = muon(models[0].parameters())
    theirs = torch.optim.Muon(models[1].parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        step(models[0], ours, seed)
        step(models[1], theirs, seed)
    moved = (models[1].weight - start).norm()
    assert (models[0].weight - models[1].weight).norm() < 0.03 * moved  # bfloat16: 8 bits, five iterations
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_muon_moves_a_kernel_as_the_matrix_of_its_output_channels():
    kernel, matrix = nn.Conv2d(6, 10, 3, bias=False), nn.Linear(54, 10, bias=False)
    with torch.no_grad():
        matrix.weight.copy_(kernel.weight.flatten(1))
    optimizers = [muon(m.parameters()) for m in (kernel, matrix)]
    for seed in range(3):
        for model, optimizer in zip((kernel, matrix), optimizers, strict=True):
            step(model, optimizer, seed)
    assert torch.equal(kernel.weight.flatten(1), matrix.weight)
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        muon([nn.Parameter(torch.zeros(10))])
    calls = []
    assert optimizers[0].step(lambda: calls.append(1) or 5) == 5
    assert calls == [1]


def rates(config, steps, total):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = build_scheduler(optimizer, config, total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return seen


def test_schedules_are_the_closed_forms():
    assert rates(OptimizerConfig(), 3, 9) == [1, 1, 1]
    assert rates(OptimizerConfig(warmup_steps=3), 5, 9) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(OptimizerConfig(schedule="linear"), 5, 4) == [1, 0.75, 0.5, 0.25, 0]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates(OptimizerConfig(schedule="cosine", final_lr_fraction=0.1), 4, 4) == pytest.approx(cosine)
    with pytest.raises(ValueError, match=r"decays over the run: set trainer\.max_steps"):
        rates(OptimizerConfig(schedule="linear"), 1, math.inf)


def test_the_logged_rates_are_those_of_the_schedule(tmp_path):
    optimizer = {"optimizer": "muon", "lr": 0.3, "muon_lr": 0.5, "embedding_lr": 0.7, "schedule": "linear"}
    options = [f"--model.optimizer.{name}={value}" for name, value in optimizer.items()]
    config = tiny_config(tmp_path, max_steps=4)
    run("fit", "--config", config, "--run.version=v", "--model.optimizer.warmup_steps=1", *options, "--run.test=false")
    rows = [row for row in run_metrics(tmp_path / "runs/tiny/v") if "train/loss" in row]
    # Half of it in the step of the warm-up, then a quarter of the peak less in each.
    factors = [0.5, 0.75, 0.5, 0.25]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([0.3 * f for f in factors])
    assert [float(row["train/muon_lr"]) for row in rows] == pytest.approx([0.5 * f for f in factors])


def test_plateau_halves_after_patience_windows_without_improvement():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WindowedPlateau(optimizer, factor=0.5, patience=2, window=3)
    means = [5.0, 4.0, 4.5, 4.2, 4.1, 4.3, 3.0]  # no improvement in windows 3-4 and 5-6
    expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    seen = []
    for mean in means:
        for offset in (-1.0, 0.0, 1.0):
            scheduler.step(torch.tensor(mean + offset))
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == expected


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": 0.0}, r"lr must be in \(0, inf\), got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 1.5)}, r"betas must be in \[0, 1\), got 1.5"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas must be two numbers, got"),
        ({"plateau_window": 0}, "plateau_window must be at least 1, got 0"),
        ({"schedule": "plateau", "warmup_steps": 5}, "no warm-up, got warmup_steps=5"),
    ],
)
def test_settings_out_of_range_are_errors(settings, match):
    with pytest.raises(ValueError, match=match):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_at_every_precision(optimizer, precision, tmp_path):
    seen = []

    class Clipped(Stranger):
        def configure_optimizers(self):
            made = build_optimizer(self, OptimizerConfig(optimizer=optimizer))
            made.register_step_post_hook(lambda *_: seen.append([p.grad.double() for p in self.parameters()]))
            return made

    plugins = []
    if precision == "16-mixed":  # Lightning has it on GPUs only; with the scaler's first scale, the step is skipped
        plugins = [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]
    settings = {"plugins": plugins} if plugins else {"precision": precision}
    for algorithm, order in (("norm", 2), ("value", math.inf)):
        clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
        trainer(tmp_path, max_steps=2, logger=False, **settings, **clip).fit(Clipped(), loader())
        norms = [torch.cat([g.flatten() for g in gradients]).norm(order).item() for gradients in seen]
        assert norms == pytest.approx([1e-3, 1e-3], rel=0.01)  # bfloat16 has 8 bits
        seen.clear()


@pytest.mark.parametrize("setting", ["embedding_lr", "readout_decay"])
def test_a_setting_for_weights_that_the_model_does_not_have_is_an_error(setting):
    with pytest.raises(ValueError, match=f"{setting} has no effect without such weights in Linear, got 0.5: remove it"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(**{setting: 0.5}))


@pytest.mark.parametrize(
    ("setting", "value", "needs"),
    [
        ("muon_lr", 0.5, "optimizer='muon'"),
        ("muon_momentum", 0.5, "optimizer='muon'"),
        ("final_lr_fraction", 0.5, "schedule='linear' or 'cosine'"),
        ("plateau_factor", 0.25, "schedule='plateau'"),
        ("plateau_patience", 3, "schedule='plateau'"),
        ("plateau_window", 3, "schedule='plateau'"),
    ],
)
def test_a_setting_of_another_optimizer_or_schedule_is_an_error(setting, value, needs):
    config = OptimizerConfig(**{setting: value})
    default = getattr(OptimizerConfig(), setting)
    message = f"{setting} has no effect without {needs}, got {value}: remove it (default: {default})"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_scheduler(build_optimizer(nn.Linear(2, 2), config), config, 10)
