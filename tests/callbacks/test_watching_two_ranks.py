"""The callbacks that watch, on two processes: counts of all of them, and the run as it is without them."""

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch.utils.data import DataLoader, DistributedSampler

from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.callbacks.samples import TextSamples
from revdeq_lightning.equilibrium import (
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.loggers.step_rows import read_rows
from tests.helpers.modules import StepByStep, Stranger, Validated, loader, sums, trainer
from tests.helpers.processes import run_apart
from tests.helpers.runs import assert_equal


class ChangeF(Callback):
    """On the second process f is another function in the backward pass of the third batch."""

    def on_before_backward(self, trainer, pl_module, loss):
        changed = trainer.global_rank == 1 and trainer.fit_loop.total_batch_idx == 2
        pl_module.layers[0].f.offset = 0.1 if changed else 0.0

    def on_after_backward(self, trainer, pl_module):
        pl_module.layers[0].f.offset = 0.0


class SaveAtEnd(Callback):
    """Each process's notes and figures, into a file of its own."""

    def __init__(self, notes, path):
        self.notes, self.path = notes, path

    def on_train_end(self, trainer, pl_module):
        figures = {key: value.item() for key, value in trainer.callback_metrics.items()}
        weights = {key: value.clone() for key, value in pl_module.state_dict().items()}
        content = (self.notes.losses, self.notes.draws, self.notes.gradients, weights), figures
        torch.save(content, self.path.with_suffix(f".{trainer.global_rank}"))


class Speaking(Validated):
    """Draws from the global generator for its text."""

    def sample_text(self, prompt, max_new_tokens, temperature):
        assert not self.training
        return str(torch.rand(()).item())


def run(folder, name, callbacks):
    notes = StepByStep()
    solvers, adjoint = (
        (ReversibleSolver(max_steps=3), MomentumSolver(max_steps=4)),
        ReversibleAdjoint(mismatch="ignore"),
    )
    module = Speaking(*solvers, dropout=0.3, adjoint=adjoint)
    callbacks = [ChangeF(), *callbacks, notes, SaveAtEnd(notes, folder / name)]
    settings = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2, "max_steps": 3}
    trainer(folder / name, callbacks, **settings).fit(module, loader(num_samples=96), loader(num_samples=32))


def compared(folder, data, **settings):
    adjoint = PhantomAdjoint(num_steps=1, beta=1.0)
    module = Stranger(PicardSolver(max_steps=3), adjoint=adjoint, lr=0.0, scale=0.9)
    callbacks = [GradientError(1, num_samples=5), SaveAtEnd(StepByStep(), folder)]
    trainer(folder / "logs", callbacks, max_steps=1, **settings).fit(module, data)


def everything(folder):
    watching = [
        Cost(),
        FunctionEvaluations(),
        ReconstructionCertificate(),
        GradientError(1, float64=True),
        Contraction(1, warn_at=9.0),
        ResidualCurve(1),
        DepthSweep(every_n_validations=1, sums=sums),
        TextSamples(["a"]),
    ]
    run(folder, "with", watching)
    run(folder, "without", [])
    compared(folder / "together", loader(), strategy="ddp_fork", devices=2)


def test_two_ranks(tmp_path):
    assert run_apart(everything, tmp_path).out.count("11 of 12 gradients certified exact") == 1
    with_callbacks, without = ([torch.load(tmp_path / f"{name}.{r}") for r in (0, 1)] for name in ("with", "without"))
    for rank in (0, 1):
        assert_equal(with_callbacks[rank][0], without[rank][0], f"rank {rank}")
        for key in ("loss", "accuracy", "val/loss"):
            assert with_callbacks[rank][1][key] == without[rank][1][key]
    assert with_callbacks[0][0][0] != with_callbacks[1][0][0]
    figures = with_callbacks[0][1]
    assert figures["equilibrium/num_gradients"] == 12  # of the end, logged after the newest logging step
    assert figures["equilibrium/num_certified_gradients"] == 11
    assert figures["equilibrium/total_forward_nfe"] == 4 * 10  # of this process
    for key, value in figures.items():
        if key.startswith("gradient_error") or "spectral_radius" in key:
            assert with_callbacks[1][1][key] == value
    assert figures["gradient_error/bptt/relative_l2"] < 1e-5

    # The files are written once, the sweep is over the first batches of both processes.
    folder = tmp_path / "with" / "logs"
    assert len(read_rows(folder / "residual_curve.csv")) == 3 * (6 + 4)
    assert [row["step"] for row in read_rows(folder / "samples.jsonl")] == [2]
    rows = read_rows(folder / "depth_sweep_validation.csv")
    assert [row["steps"] for row in rows] == ["1", "2", "4", "8", "16"]
    module = Stranger(ReversibleSolver(max_steps=3), MomentumSolver(max_steps=4)).eval()
    inputs, labels = (t[:16] for t in loader(num_samples=32).dataset.tensors)
    losses = []
    for rank in (0, 1):  # each has BatchNorm's running statistics of its own
        module.load_state_dict(with_callbacks[rank][0][3])
        losses.append(F.cross_entropy(module(inputs[rank::2]), labels[rank::2]).item())
    assert float(rows[2]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-6)

    # An error over the samples of both processes lies between those over each one's.
    together = torch.load(tmp_path / "together.0")[1]
    for rank in (0, 1):
        folder = tmp_path / f"alone{rank}"
        data = loader().dataset
        # As Lightning shares the samples out.
        compared(folder, DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=2, rank=rank)))
    alone = [torch.load(tmp_path / f"alone{rank}.0")[1] for rank in (0, 1)]
    for key in ("gradient_error/bptt/relative_l2", "gradient_error/converged/relative_l2"):
        low, high = sorted(figures[key] for figures in alone)
        assert low < together[key] < high
    key = "gradient_error/converged/relative_residual"
    assert together[key] == pytest.approx(max(figures[key] for figures in alone), rel=1e-3)
