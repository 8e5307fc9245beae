"""`~` and variables of the environment in settings."""

import os
import re
from collections.abc import Sequence

VARIABLE = re.compile(r"(?<!\\)\$\{([A-Za-z_]\w*)\}")
PATH = re.compile(r"(^-+|^|[._])(path|folder|file|images|output|tokenizer|config|c|\w*dir|\w*dirpath)$")
"""Names of settings that are paths."""


def with_variables(text: str) -> str:
    """The text with the values of `${VARIABLES}` of the environment."""
    return VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), text)


def expanded(path: str) -> str:
    """A path with the values of `~`, `$VARIABLE` and `${VARIABLE}`."""
    return os.path.expanduser(os.path.expandvars(path))


def with_expanded_paths(options: Sequence[str]) -> list[str]:
    """The command line with expanded paths, as `--name PATH` or `--name=PATH`."""
    result, before = [], ""
    for option in options:
        name, equals, value = option.partition("=")
        if option.startswith("-") and equals:
            result.append(f"{name}={expanded(value)}" if PATH.search(name) else option)
        else:
            result.append(expanded(option) if PATH.search(before) else option)
        before = option
    return result
