"""Renders HTML pages from jinja2 templates; values are escaped unless the template marks them as safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irc.errors import InputError


def render(template: Path, **values: Any) -> str:
    """Return the text of a template with its values filled in.

    Args:
        template: A template file of this package.
        **values: The values that the template uses, by name.

    Raises:
        InputError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError(
            "HTML pages need jinja2; install it with: pip install 'informed-routing-compiler[report]'"
        ) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)
