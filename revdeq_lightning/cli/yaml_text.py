"""Settings as YAML that is read back as it was written."""

import re
from typing import Any

import jsonargparse
import yaml

from revdeq_lightning.cli.paths import PATH, expanded, with_variables

_load = jsonargparse.get_loader("yaml")


def prepare_jsonargparse() -> None:
    """Make the parsers of this process read and write YAML as below."""
    for mode in ("yaml", "omegaconf+"):
        jsonargparse.set_loader(mode, load_yaml, (yaml.YAMLError,))
    jsonargparse.set_dumper("yaml", dump_yaml)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes all texts but words and paths, as dialects of YAML disagree on which of the others are numbers."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = re.fullmatch(r"[A-Za-z_/][\w./ -]*(?<! )", text, re.ASCII) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(settings: Any) -> str:
    """The settings as YAML."""
    return str(yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6))


def load_yaml(text: str) -> Any:
    """The settings of a file, with expanded paths and variables, or a single value."""
    value = _load(text)
    # For YAML, values such as `#1` are empty.
    return text if value is None and len(text.splitlines()) == 1 else _map_texts(value, _expand)


def without_interpolation(settings: Any) -> Any:
    """The settings with each `${` escaped, for which the parser would look for another setting."""
    return _map_texts(settings, lambda _, text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def _expand(name: str, text: str) -> str:
    return expanded(text) if PATH.search(name) else with_variables(text)


def _map_texts(value: Any, change: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _map_texts(part, change, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_texts(part, change, name) for part in value]
    return change(name, value) if isinstance(value, str) else value
