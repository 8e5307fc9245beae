"""How many evaluations of f the equilibria cost, and how near to the fixed point they end."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer

from revdeq_lightning.callbacks.abstract import AbstractWatching
from revdeq_lightning.equilibrium import AbstractSolver, SolverStats, equilibria
from revdeq_lightning.tasks.training_step import is_logging_step


class FunctionEvaluations(AbstractWatching):
    """Counts the evaluations of f in forward and backward passes, and logs how near to the fixed point the solves end.

    Everything comes from the solves' own statistics: f is not evaluated again, and nothing waits for the device except
    at logging steps.

    Keys, of the newest batch of the first process, all beginning with `equilibrium/`:

    * `forward_nfe`, `backward_nfe`: evaluations of f, of all equilibria of the model together.
    * `total_forward_nfe`, `total_backward_nfe`: their sums over the run, every batch counted, also after a resumption.
    * `relative_residual`: at the end of the solve, mean over samples and equilibria; `backward_relative_residual`: that
      of the linear system of an implicit adjoint.
    * `reconstruction_mismatch`: elements that the backward passes did not reconstruct; 0 certifies the gradient.
    * `fraction_converged`: samples that meet the tolerance, if there is one.
    * `sample_nfe_mean`, `sample_nfe_max`: forward evaluations until a sample met the tolerance, if there is one.

    A model with several equilibria logs all but the sums for each of them too: `1/forward_nfe`, `2/forward_nfe` ...;
    and `sample_nfe...` for each only. What an adjoint or a solver does not have is not logged.

    `sample_nfe...` assumes that each layer is called once a step, in the order of the modules.
    """

    def __init__(self) -> None:
        self.total_forward_nfe = self.total_backward_nfe = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        stats = self.take(outputs)
        if not stats:
            return
        self.total_forward_nfe += sum(s.forward_nfe for s in stats)
        self.total_backward_nfe += sum(s.backward_nfe or 0 for s in stats)
        if not is_logging_step(trainer):
            return
        values = _figures(stats) | {"total_forward_nfe": self.total_forward_nfe}
        if values["backward_nfe"] is not None:
            values["total_backward_nfe"] = self.total_backward_nfe
        if len(stats) > 1:
            for i, s in enumerate(stats, 1):
                values |= {f"{i}/{key}": value for key, value in _figures([s]).items()}
        for i, (solver, s) in enumerate(zip(_solvers(pl_module, len(stats)), stats, strict=False), 1):
            if s.converged is not None:
                name, nfe = "" if len(stats) == 1 else f"{i}/", s.num_steps * solver.evaluations_per_step
                values |= {f"{name}sample_nfe_mean": nfe.float().mean(), f"{name}sample_nfe_max": nfe.max()}
        known = {f"equilibrium/{key}": torch.as_tensor(v).float() for key, v in values.items() if v is not None}
        pl_module.log_dict(known, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, int]:
        return {"total_forward_nfe": self.total_forward_nfe, "total_backward_nfe": self.total_backward_nfe}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.total_forward_nfe = state_dict["total_forward_nfe"]
        self.total_backward_nfe = state_dict["total_backward_nfe"]


def _solvers(pl_module: LightningModule, num_solves: int) -> list[AbstractSolver]:
    """The solver of each solve of a step; none if the layers are not called once each."""
    solvers = [layer.solver for layer in equilibria(pl_module)]
    if len(solvers) == 1:
        return solvers * num_solves
    return solvers if len(solvers) == num_solves else []


def _figures(stats: Sequence[SolverStats]) -> dict[str, Any]:
    """Figures of some solves together; None for what they do not have."""
    values: dict[str, Any] = {}
    for name in ("forward_nfe", "backward_nfe", "reconstruction_mismatch"):
        counts = [getattr(s, name) for s in stats]
        values[name] = None if None in counts else sum(counts)
    for name in ("relative_residual", "backward_relative_residual"):
        residuals = [getattr(s, name) for s in stats]
        values[name] = None if None in residuals else torch.stack([r.mean() for r in residuals]).mean()
    converged = [s.converged for s in stats if s.converged is not None]
    values["fraction_converged"] = torch.cat(converged).float().mean() if converged else None
    return values
