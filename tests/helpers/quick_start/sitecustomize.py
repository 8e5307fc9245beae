"""On the path of processes that tests start: they need half the time to import Lightning.

Lightning imports torchmetrics, which imports each of these packages if it is installed, for metrics that no run has.
"""

import importlib.metadata
import importlib.util
import sys
from typing import Any

NOT_FOR_TORCHMETRICS = ("transformers", "scipy", "matplotlib", "torchvision")


class Finder:
    """Finds torchmetrics, once, and lets it see none of these packages while it is imported."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "torchmetrics":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        from lightning_utilities.core import imports

        spec = importlib.util.find_spec(name)
        loader, version = spec.loader, imports._version
        execute = loader.exec_module

        def hidden(package: str) -> str:
            if package in NOT_FOR_TORCHMETRICS:
                raise importlib.metadata.PackageNotFoundError(package)
            return version(package)

        def exec_module(module: Any) -> None:
            absent = [package for package in NOT_FOR_TORCHMETRICS if package not in sys.modules]
            sys.modules.update(dict.fromkeys(absent))
            imports._version = hidden
            try:
                execute(module)
            finally:
                imports._version = version
                for package in absent:
                    del sys.modules[package]

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
