"""The callbacks that watch equilibria and cost, from one dataclass."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lightning import Callback

from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.equilibrium.validation import require_count


@dataclass
class DiagnosticsConfig:
    """What is measured during training, besides evaluations of f, residual, throughput and memory.

    Attributes:
        certificate: What to do at the first logging step after a gradient that is not exact: warn, raise, or stop with
            a checkpoint. (model.solver.mismatch acts in the backward pass itself.)
        gradient_error_every_n_steps: Optimizer steps between two comparisons of the gradient with BPTT and with the
            gradient at the converged fixed point; 0 for none.
        gradient_error_num_samples: Samples of each of these comparisons.
        gradient_error_float64: Whether to compute their references in float64.
        contraction_every_n_steps: Optimizer steps between two estimates of the spectral radius of df/dz; 0 for none.
        residual_curve_every_n_steps: Optimizer steps between two residual curves along the iteration; 0 for none.
        depth_sweep_every_n_validations: Validations between two sweeps over the solver's steps; 0 for none.
        depth_sweep_num_batches: Batches of each of these sweeps, which cost about eight times their evaluation.
        samples_every_n_validations: Validations between two samples, text or a sheet of images; 0 for none.
        peak_flops: Peak operations per second of one device, for model FLOP utilization; null: from a table of GPUs.
    """

    certificate: Literal["warn", "raise", "stop"] = "warn"
    gradient_error_every_n_steps: int = 0
    gradient_error_num_samples: int = 2
    gradient_error_float64: bool = False
    contraction_every_n_steps: int = 0
    residual_curve_every_n_steps: int = 100
    depth_sweep_every_n_validations: int = 1
    depth_sweep_num_batches: int = 1
    samples_every_n_validations: int = 1
    peak_flops: float | None = None

    def callbacks(self, has_equilibrium: bool = True) -> list[Callback]:
        """The callbacks, in the order in which they should be called.

        Raises:
            ValueError: If a setting is out of its range, or needs an equilibrium and the model has none.
        """
        for field in dataclasses.fields(self):
            if "_every_n_" in field.name:
                require_count(field.name, getattr(self, field.name), at_least=0)
        for name in ("gradient_error_every_n_steps", "contraction_every_n_steps"):
            if getattr(self, name) and not has_equilibrium:
                raise ValueError(f"{name} needs a model with an equilibrium, got {getattr(self, name)}: set it to 0")
        callbacks: list[Callback] = [
            Cost(self.peak_flops),
            FunctionEvaluations(),
            ReconstructionCertificate(self.certificate),
        ]
        if self.residual_curve_every_n_steps and has_equilibrium:
            callbacks.append(ResidualCurve(self.residual_curve_every_n_steps))
        if self.gradient_error_every_n_steps:
            num_samples, float64 = self.gradient_error_num_samples, self.gradient_error_float64
            callbacks.append(GradientError(self.gradient_error_every_n_steps, num_samples=num_samples, float64=float64))
        if self.contraction_every_n_steps:
            callbacks.append(Contraction(self.contraction_every_n_steps))
        return callbacks
