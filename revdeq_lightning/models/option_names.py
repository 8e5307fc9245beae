"""How `SolverConfig` names the options of adjoints. Imports no PyTorch, so that wrong names are reported at once."""

OWN_OPTIONS = (
    *("solver", "adjoint", "num_losses", "loss_decay", "backward_solver", "backward_max_steps", "backward_rtol"),
    "compiled",
)
"""Options of `SolverConfig` that are not arguments of a solver or an adjoint."""


def adjoint_option(adjoint: str, argument: str) -> str:
    """`phantom_steps` for phantom's `num_steps`; the options that came first have no prefix."""
    old = argument in ("checkpoint", "mismatch", "unconverged")
    return argument if old else f"{adjoint}_{argument.removeprefix('num_')}"
