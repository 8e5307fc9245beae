"""The settings of a task as plain data, and what they stand for; no Lightning in here."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
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
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
}
DEFAULT_ADJOINT = {"momentum": "reversible", "reversible": "reversible", "anderson": "implicit", "broyden": "implicit"}
"""Of the solvers that are not here: backprop."""


@dataclass
class SolverConfig:
    """How the equilibrium is found and differentiated.

    Attributes:
        solver: momentum (1 evaluation of f a step), reversible (the paper's, 2 evaluations a step), relaxed, picard,
            anderson, broyden, or none: an explicit stack of `network.num_layers` layers without equilibrium, the
            baseline.
        max_steps: Most steps of the solver.
        beta: Relaxation parameter; null for the solver's own default.
        momentum: Weight of the last move, momentum solver only; null for its default.
        rtol: Relative tolerance; with rtol and atol 0 every sample makes max_steps steps.
        atol: Absolute tolerance.
        arithmetic: How a reversible solver holds the state: exact, float64 or float32; null for exact.
        compiled: Compile the exact state's updates (a C++ compiler on a CPU, Triton on a GPU): as exact, in a third of
            the time, which counts where f is small.
        memory: Anderson and broyden: how many iterates or updates are kept; null for the solver's own default.
        ridge: Anderson only: relative regularisation of its least squares; null for its default.
        max_halvings: Broyden only: most halvings of a step in its line search; null for its default, 0 for none.
        adjoint: reversible (exact, memory does not grow with the steps), backprop (exact, stored), implicit (of the
            fixed point, by a linear solve) or phantom (a few steps in its place); null: reversible for momentum and
            reversible, implicit for anderson and broyden, else backprop.
        checkpoint: Backprop only: store the iterates, evaluate f once more in the backward pass.
        backprop_evaluations: Backprop only: differentiate this many of the last evaluations (truncated back-propagation
            through time); null for all.
        mismatch: Reversible adjoint only: what to do where a gradient is found not to be exact.
        unconverged: Implicit only: what to do where a solve does not reach its tolerance; null for a warning.
        backward_solver: Implicit only: solver of its linear system; null for anderson.
        backward_max_steps: Implicit only: most steps of it; null for 50.
        backward_rtol: Implicit only: relative tolerance of it; null for 1e-5.
        phantom_kind: Phantom only: unrolled or neumann; null for unrolled.
        phantom_steps: Phantom only: differentiated steps; null for 10.
        phantom_beta: Phantom only: relaxation parameter of them; null for 0.5.
        num_losses: Language models, fixed-point correction: the solve is made in so many parts, and trained on the
            weighted mean of the losses at their ends; 1 for none.
        loss_decay: Of fixed-point correction: weight of each part's loss over that of the next one; null for 0.8.
    """

    solver: Literal["momentum", "reversible", "relaxed", "picard", "anderson", "broyden", "none"] = "momentum"
    max_steps: int = 8
    beta: float | None = None
    momentum: float | None = None
    rtol: float = 0.0
    atol: float = 0.0
    arithmetic: Literal["exact", "float64", "float32"] | None = None
    compiled: bool = False
    memory: int | None = None
    ridge: float | None = None
    max_halvings: int | None = None
    adjoint: Literal["reversible", "backprop", "implicit", "phantom"] | None = None
    checkpoint: bool = False
    backprop_evaluations: int | None = None
    mismatch: Literal["warn", "raise", "ignore"] = "warn"
    unconverged: Literal["warn", "raise", "ignore"] | None = None
    backward_solver: Literal["momentum", "reversible", "relaxed", "picard", "anderson", "broyden"] | None = None
    backward_max_steps: int | None = None
    backward_rtol: float | None = None
    phantom_kind: Literal["unrolled", "neumann"] | None = None
    phantom_steps: int | None = None
    phantom_beta: float | None = None
    num_losses: int = 1
    loss_decay: float | None = None

    @property
    def correction(self) -> dict[str, Any]:
        """Arguments of fixed-point correction.

        Raises:
            ValueError: If there is a decay but nothing to decay.
        """
        if self.loss_decay is not None and self.num_losses == 1:
            raise ValueError(f"loss_decay={self.loss_decay} needs num_losses above 1, got 1: leave it out")
        return {"num_losses": self.num_losses, "loss_decay": 0.8 if self.loss_decay is None else self.loss_decay}

    def build_solver(self) -> Any:
        """The solver.

        Raises:
            ValueError: If a setting is out of range, or is one that this solver does not have.
        """
        names = ("beta", "momentum", "arithmetic", "memory", "ridge", "max_halvings")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.compiled:
            given["compiled"] = True
        for name in given.keys() - {field.name for field in fields(SOLVERS[self.solver])}:
            raise ValueError(f"solver={self.solver!r} has no {name}, got {name}={given[name]!r}: leave it out")
        return SOLVERS[self.solver](max_steps=self.max_steps, rtol=self.rtol, atol=self.atol, **given)

    def build_adjoint(self) -> Any:
        """The gradient rule.

        Raises:
            ValueError: If a setting is out of range or belongs to another adjoint, or the adjoint cannot carry the
                solver.
        """
        adjoint = self.adjoint or DEFAULT_ADJOINT.get(self.solver, "backprop")
        if adjoint == "reversible" and DEFAULT_ADJOINT.get(self.solver) != "reversible":
            raise ValueError(
                f"adjoint='reversible' cannot run solver={self.solver!r} backwards: choose adjoint='backprop',"
                " 'implicit' or 'phantom', or solver='reversible' or 'momentum'"
            )
        if self.checkpoint and adjoint != "backprop":
            raise ValueError(f"checkpoint=True belongs to adjoint='backprop', got adjoint={adjoint!r}: leave it out")
        self._require_adjoint("backprop", adjoint, "backprop_evaluations")
        for name in ("unconverged", "backward_solver", "backward_max_steps", "backward_rtol"):
            self._require_adjoint("implicit", adjoint, name)
        for name in ("phantom_kind", "phantom_steps", "phantom_beta"):
            self._require_adjoint("phantom", adjoint, name)
        if self.mismatch != "warn":
            self._require_adjoint("reversible", adjoint, "mismatch")
            if self.arithmetic in ("float32", "float64"):
                raise ValueError(
                    f"mismatch={self.mismatch!r} needs arithmetic='exact', got {self.arithmetic!r}, whose gradients are"
                    " never certified: leave one of them out"
                )
        if adjoint == "implicit":
            backward = SOLVERS[self.backward_solver or "anderson"]
            return ImplicitAdjoint(
                solver=backward(
                    max_steps=50 if self.backward_max_steps is None else self.backward_max_steps,
                    rtol=1e-5 if self.backward_rtol is None else self.backward_rtol,
                ),
                unconverged=self.unconverged or "warn",
            )
        if adjoint == "phantom":
            options: dict[str, Any] = {
                "kind": self.phantom_kind,
                "num_steps": self.phantom_steps,
                "beta": self.phantom_beta,
            }
            return PhantomAdjoint(**{name: value for name, value in options.items() if value is not None})
        if adjoint == "backprop":
            return BackpropAdjoint(checkpoint=self.checkpoint, num_evaluations=self.backprop_evaluations)
        return ReversibleAdjoint(mismatch=self.mismatch)

    def require_no_settings(self) -> None:
        """For `solver="none"`; the steps may stay, which every file with a solver sets.

        Raises:
            ValueError: If a setting is given that only a solver has.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("solver", "max_steps") and value != field.default:
                raise ValueError(f"solver='none' has no {field.name}, got {field.name}={value!r}: leave it out")

    def _require_adjoint(self, owner: str, adjoint: str, name: str) -> None:
        """Raise if a setting is given that belongs to another adjoint."""
        value = getattr(self, name)
        if value is not None and adjoint != owner:
            raise ValueError(f"{name}={value!r} belongs to adjoint={owner!r}, got adjoint={adjoint!r}: leave it out")


def build_language_model(network: TransformerConfig, solver: SolverConfig) -> ExplicitTransformerLM | TransformerLM:
    """The model that the settings describe."""
    correction = solver.correction
    if solver.solver == "none":
        solver.require_no_settings()
        return ExplicitTransformerLM(network)
    return TransformerLM(network, solver.build_solver(), solver.build_adjoint(), **correction)


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
    if solver.num_losses != 1 or solver.loss_decay is not None:
        raise ValueError(f"num_losses={solver.num_losses} belongs to language models: leave it and loss_decay out")
    if network.architecture == "resnet":
        solver.require_no_settings()
        return ResNet(network)
    return build_classifier(network, solver.build_solver(), solver.build_adjoint())


def plain(**settings: Any) -> dict[str, dict[str, Any]]:
    """Dataclasses as plain containers, which a checkpoint holds without code (`weights_only=True`)."""
    return {name: asdict(value) for name, value in settings.items()}
