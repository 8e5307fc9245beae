"""Import the public names of a package when they are first used (PEP 562)."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the names that a package imports under `if TYPE_CHECKING:` importable from it.

    Importing a name imports only its module: a callback does not import wandb, and `--help` does not import PyTorch.
    The names are written once, where type checkers, editors and the documentation find them.

    Example:
        if TYPE_CHECKING:
            from revdeq_lightning.callbacks.cost import Cost as Cost

        __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
    """
    blocks = [node for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: "." * node.level + str(node.module) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name], package), name)

    def __dir__() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *modules})

    return __getattr__, __dir__, sorted(modules)
