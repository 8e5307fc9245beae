"""The settings of a task as plain data, and what they stand for; no Lightning in here."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import (
    AbstractClassifier,
    ClassifierConfig,
    ExplicitTransformerLM,
    ResNet,
    TransformerConfig,
    TransformerLM,
    build_classifier,
)

SOLVERS: dict[str, Any] = {
    "momentum": MomentumSolver,
    "reversible": ReversibleSolver,
    "relaxed": RelaxedSolver,
    "picard": PicardSolver,
}
REVERSIBLE = ("momentum", "reversible")


@dataclass
class SolverConfig:
    """How the equilibrium is found and differentiated.

    Attributes:
        solver: momentum (1 evaluation of f a step), reversible (the paper's, 2 evaluations a step), relaxed, picard, or
            none: an explicit stack of `network.num_layers` layers without equilibrium, the baseline.
        max_steps: Most steps of the solver.
        beta: Relaxation parameter; null for the solver's own default.
        momentum: Weight of the last move, momentum solver only; null for its default.
        rtol: Relative tolerance; with rtol and atol 0 every sample makes max_steps steps.
        atol: Absolute tolerance.
        arithmetic: How a reversible solver holds the state: exact, float64 or float32; null for exact.
        adjoint: reversible (memory does not grow with the steps) or backprop (stored); null: as the solver is.
        checkpoint: Backprop only: store the iterates, evaluate f once more in the backward pass.
        mismatch: Reversible adjoint only: what to do where a gradient is found not to be exact.
    """

    solver: Literal["momentum", "reversible", "relaxed", "picard", "none"] = "momentum"
    max_steps: int = 8
    beta: float | None = None
    momentum: float | None = None
    rtol: float = 0.0
    atol: float = 0.0
    arithmetic: Literal["exact", "float64", "float32"] | None = None
    adjoint: Literal["reversible", "backprop"] | None = None
    checkpoint: bool = False
    mismatch: Literal["warn", "raise", "ignore"] = "warn"

    def build_solver(self) -> Any:
        """The solver.

        Raises:
            ValueError: If a setting is out of range, or is one that this solver does not have.
        """
        options = {"beta": self.beta, "momentum": self.momentum, "arithmetic": self.arithmetic}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - {field.name for field in fields(SOLVERS[self.solver])}:
            raise ValueError(f"solver={self.solver!r} has no {name}, got {name}={given[name]!r}: leave it out")
        return SOLVERS[self.solver](max_steps=self.max_steps, rtol=self.rtol, atol=self.atol, **given)

    def build_adjoint(self) -> Any:
        """The gradient rule.

        Raises:
            ValueError: If `checkpoint` is set for the reversible adjoint.
        """
        adjoint = self.adjoint or ("reversible" if self.solver in REVERSIBLE else "backprop")
        if adjoint == "backprop":
            return BackpropAdjoint(checkpoint=self.checkpoint)
        if self.checkpoint:
            raise ValueError(
                "checkpoint=True belongs to adjoint='backprop', got adjoint='reversible', which stores nothing"
            )
        return ReversibleAdjoint(mismatch=self.mismatch)


def build_language_model(network: TransformerConfig, solver: SolverConfig) -> ExplicitTransformerLM | TransformerLM:
    """The model that the settings describe."""
    if solver.solver == "none":
        return ExplicitTransformerLM(network)
    return TransformerLM(network, solver.build_solver(), solver.build_adjoint())


def build_image_classifier(network: ClassifierConfig, solver: SolverConfig) -> AbstractClassifier:
    """The model that the settings describe.

    Raises:
        ValueError: If the architecture and the solver do not fit.
    """
    if (network.architecture == "resnet") != (solver.solver == "none"):
        raise ValueError(
            "architecture='resnet' has no equilibrium and takes solver='none', every other one needs a solver, got "
            f"architecture={network.architecture!r} and solver={solver.solver!r}"
        )
    if network.architecture == "resnet":
        return ResNet(network)
    return build_classifier(network, solver.build_solver(), solver.build_adjoint())


def plain(**settings: Any) -> dict[str, dict[str, Any]]:
    """Dataclasses as plain containers, which a checkpoint holds without code (`weights_only=True`)."""
    return {name: asdict(value) for name, value in settings.items()}
