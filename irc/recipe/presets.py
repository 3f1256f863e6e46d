"""The ready recipes that come with irc: each is named after a model and the percentage to skip."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from irc.errors import InputError
from irc.files.strict_yaml import parse_yaml, short_repr
from irc.files.untrusted import read_text

SHARES = (25, 40, 70)


def ready_names() -> list[str]:
    """Return the names of all ready recipes, such as `llama-3.2-1b-25`."""
    return [f"{stem}-{share}" for stem in _stems() for share in SHARES]


def read_recipe(name: Path) -> dict[str, Any]:
    """Return the content of a ready recipe or of a YAML file.

    Args:
        name: `llama-3.2-1b-40`, the same without a percentage (which means 25), or the path of a YAML file.

    Raises:
        InputError: There is no such recipe or file, or it does not hold keys and values.
    """
    stem, share = _split(str(name))
    if stem in _stems() and not name.is_file():
        text = (resources.files("irc") / "recipe" / "ready" / f"{stem}.yaml").read_text(encoding="utf-8")
        found: dict[str, Any] = yaml.safe_load(text)
        return found if share is None else {**found, "sparsity": share / 100}
    try:
        data = parse_yaml(read_text(name))
    except FileNotFoundError as error:
        raise InputError(f"recipe {name}: no such file; {_ready()}") from error
    except IsADirectoryError as error:
        raise InputError(f"recipe {name}: is a folder; give a YAML file or a ready recipe; {_ready()}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"recipe {name}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        found_instead = "it is empty" if data is None else f"it holds {short_repr(data)}"
        raise InputError(f"recipe {name}: {found_instead}; expected keys and values, such as sparsity: 0.25")
    return data


def _ready() -> str:
    return f"ready recipes are {', '.join(_stems())}, each also with -{', -'.join(map(str, SHARES))}"


def _split(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)-(\d\d)", name)
    return (found[1], int(found[2])) if found and int(found[2]) in SHARES else (name, None)


def _stems() -> list[str]:
    folder = resources.files("irc") / "recipe" / "ready"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
