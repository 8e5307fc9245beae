"""Settings of a task as plain data, and the models they describe. Independent of Lightning."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

import docstring_parser

from revdeq_lightning.equilibrium import AbstractAdjoint, AbstractSolver, ImplicitAdjoint
from revdeq_lightning.equilibrium.adjoints import ADJOINTS
from revdeq_lightning.equilibrium.solvers import SOLVERS
from revdeq_lightning.equilibrium.validation import refuse_unused
from revdeq_lightning.models.classifier import AbstractClassifier, ResNet, build_classifier
from revdeq_lightning.models.config import ClassifierConfig, ReasonerConfig, TransformerConfig
from revdeq_lightning.models.option_names import adjoint_option
from revdeq_lightning.models.reasoner import ExplicitReasoner, Reasoner
from revdeq_lightning.models.transformer import ExplicitTransformerLM, TransformerLM

_DEFAULTS = {"max_steps": 8, "rtol": 0.0, "atol": 0.0, "checkpoint": False, "mismatch": "warn"}
"""All other options default to null, which selects the default of the solver or adjoint."""


class _Option(NamedTuple):
    type: Any
    default: Any
    help: str
    arguments: dict[str, str]
    """Argument names by solver or adjoint."""


def _options(classes: Mapping[str, type], option_name: Callable[[str, str], str]) -> dict[str, _Option]:
    """Arguments of registered classes as options; type and help are those of the first class that has it."""
    options: dict[str, _Option] = {}
    for owner, cls in classes.items():
        types = get_type_hints(cls)
        documents = (docstring_parser.parse(base.__doc__ or "") for base in reversed(cls.__mro__))
        texts = {p.arg_name: p.description or "" for document in documents for p in document.params}
        for argument in (f.name for f in fields(cls)):
            name = option_name(owner, argument)
            kind = types[argument] if name in _DEFAULTS else types[argument] | None
            new = _Option(kind, _DEFAULTS.get(name), " ".join(texts.get(argument, "").split()), {})
            options.setdefault(name, new).arguments[owner] = argument
    return options


_SOLVER_OPTIONS = _options(SOLVERS, lambda solver, argument: argument)
_ADJOINT_OPTIONS = _options(ADJOINTS, adjoint_option)
_ADJOINT_OPTIONS.pop("implicit_solver")
_ADJOINT_OPTIONS |= {
    f"backward_{name}": _Option(kind | None, None, f"{name} of the backward linear solve", {"implicit": "solver"})
    for name, kind in (("solver", Literal[tuple(SOLVERS)]), ("max_steps", int), ("rtol", float))
}
_OPTIONS = {
    "solver": _Option(Literal[(*SOLVERS, "none")], "momentum", "none: an explicit stack of layers, the baseline", {}),
    **_SOLVER_OPTIONS,
    "adjoint": _Option(Literal[tuple(ADJOINTS)] | None, None, "null: the one that suits the solver", {}),
    **_ADJOINT_OPTIONS,
    "num_losses": _Option(
        int,
        1,
        "language models and reasoners: parts of the solve, each with a loss (fixed-point correction); 1 for none",
        {},
    ),
    "loss_decay": _Option(float | None, None, "weight of each part's loss over that of the next; null for 0.8", {}),
    "compiled": _Option(bool, False, "no longer has an effect; older configurations have it", {}),
}
_Settings: Any = make_dataclass("_Settings", [(n, o.type, field(default=o.default)) for n, o in _OPTIONS.items()])


@dataclass
class SolverConfig(_Settings):  # type: ignore[misc]
    """How the equilibrium is found and differentiated."""

    @property
    def correction(self) -> dict[str, Any]:
        if self.loss_decay is not None and self.num_losses == 1:
            raise ValueError(f"loss_decay={self.loss_decay} needs num_losses above 1, got 1: remove it")
        return {"num_losses": self.num_losses, "loss_decay": 0.8 if self.loss_decay is None else self.loss_decay}

    def build_solver(self) -> AbstractSolver:
        """The solver; ValueError if a setting is out of range or unknown to the solver."""
        if self.compiled:
            warnings.warn("compiled=True no longer has an effect: remove it", stacklevel=2)
        given = self._given(_SOLVER_OPTIONS)
        for name, value in given.items():
            if self.solver not in _SOLVER_OPTIONS[name].arguments:
                raise ValueError(f"solver={self.solver!r} has no {name}, got {name}={value!r}: {_removal(name)}")
        shared = {f.name: getattr(self, f.name) for f in fields(AbstractSolver)}
        return SOLVERS[self.solver](**shared | given)

    def build_adjoint(self) -> AbstractAdjoint:
        """The adjoint; ValueError if a setting is out of range or of another adjoint, or the solver does not fit."""
        adjoint = self.adjoint or SOLVERS[self.solver].default_adjoint
        given = self._given(_ADJOINT_OPTIONS)
        for name, value in given.items():
            if adjoint not in (owners := _ADJOINT_OPTIONS[name].arguments):
                owner = " or ".join(map(repr, owners))
                told = f"{name}={value!r} belongs to adjoint={owner}, got adjoint={adjoint!r}"
                raise ValueError(f"{told}: {_removal(name)}")
        arguments = {_ADJOINT_OPTIONS[name].arguments[adjoint]: value for name, value in given.items()}
        if "mismatch" in given and self.arithmetic in ("float32", "float64"):
            raise ValueError(
                f"mismatch={self.mismatch!r} needs arithmetic='exact', got {self.arithmetic!r}, whose gradients are"
                " never certified: remove one of them"
            )
        if adjoint == "implicit":
            default = ImplicitAdjoint().solver
            arguments["solver"] = SOLVERS[self.backward_solver or "anderson"](
                max_steps=default.max_steps if self.backward_max_steps is None else self.backward_max_steps,
                rtol=default.rtol if self.backward_rtol is None else self.backward_rtol,
            )
        rule = ADJOINTS[adjoint](**arguments)
        solver = self.build_solver()
        try:
            rule.check(solver)
        except ValueError as error:
            raise ValueError(f"solver={self.solver!r} with adjoint={adjoint!r}: {error}") from error
        return rule

    def require_no_settings(self) -> None:
        """For `solver="none"`: ValueError if another setting is given. `max_steps` may stay: base files set it."""
        for name, value in self._given(_OPTIONS).items():
            if name not in ("solver", "max_steps"):
                raise ValueError(f"solver='none' has no {name}, got {name}={value!r}: {_removal(name)}")

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) != _OPTIONS[name].default}


def _removal(name: str) -> str:
    default = _OPTIONS[name].default
    return f"remove it (default: {'null' if default is None else default})"


def _help(name: str, option: _Option) -> str:
    owners = f"{', '.join(option.arguments)}: " if option.arguments else ""
    return f"    {name}: {owners}{option.help}"


SolverConfig.__doc__ = "\n".join([f"{SolverConfig.__doc__}\n\nArgs:", *(_help(*item) for item in _OPTIONS.items())])


def build_language_model(network: TransformerConfig, solver: SolverConfig) -> ExplicitTransformerLM | TransformerLM:
    """The model that the settings describe."""
    correction = solver.correction
    if solver.solver == "none":
        solver.require_no_settings()
        return ExplicitTransformerLM(network)
    return TransformerLM(network, solver.build_solver(), solver.build_adjoint(), **correction)


def build_image_classifier(network: ClassifierConfig, solver: SolverConfig) -> AbstractClassifier:
    """The model that the settings describe; ValueError if the architecture and the solver do not fit."""
    if (network.architecture == "resnet") != (solver.solver == "none"):
        raise ValueError(
            "architecture='resnet' needs solver='none', and every other architecture needs a solver, got "
            f"architecture={network.architecture!r} and solver={solver.solver!r}"
        )
    if solver.num_losses != 1 or solver.loss_decay is not None:
        raise ValueError(
            f"num_losses={solver.num_losses} belongs to language models and reasoners: remove it and loss_decay"
        )
    if network.steps:
        needs = f"stages that share it (steps={network.steps})"
        refuse_unused(vars(solver), SolverConfig, needs, "max_steps")
    if network.architecture == "resnet":
        solver.require_no_settings()
        return ResNet(network)
    return build_classifier(network, solver.build_solver(), solver.build_adjoint())


def build_reasoner(network: ReasonerConfig, solver: SolverConfig) -> ExplicitReasoner | Reasoner:
    """The model that the settings describe."""
    correction = solver.correction
    if solver.solver == "none":
        solver.require_no_settings()
        refuse_unused(vars(network), ReasonerConfig, "an equilibrium", "growth")
        return ExplicitReasoner(network)
    return Reasoner(network, solver.build_solver(), solver.build_adjoint(), **correction)
