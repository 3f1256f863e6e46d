"""What a comparison left on disk, checked before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.untrusted import first_line, read_json

_FIGURES = ("perplexity", "sparsity", "flops_ratio", "units", "seconds", "stages")
_MOST = 1e306  # a perplexity is at most exp(700), over another's
_DEEPEST = 8
_SLACK = 1e-6  # a share is a mean, and sums are rounded
_UNIT = re.compile(r"[A-Za-z0-9_.]{1,200}")  # plots draw the name of one


def check_same(path: Path, facts: dict[str, Any]) -> None:
    """Hold the manifest of a comparison against that of the one that would continue it.

    Args:
        path: Of `compare.json`.
        facts: What it would hold now.

    Raises:
        InputError: It is damaged, or another model, text or setting was compared.
    """
    output = path.parent
    try:
        before = read_json(path)
        recipe, data = _object(before, "recipe"), _object(before, "data")
        identity, fingerprint = before["base_identity"], data["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; start over with --force") from error
    if identity != facts["base_identity"]:
        raise InputError(f"{output}: compares {_shown(before.get('model'))}, another model; give another --output")
    if fingerprint != facts["data"]["fingerprint"]:
        raise InputError(f"{output}: was made on another text ({_shown(data.get('name'))}); give another --output")
    for key, old, new in _differing(recipe, facts["recipe"]):
        raise InputError(
            f"{output}: was begun with {key} = {_shown(old)}, now it is {new}; give the same settings with "
            "--resume, or another --output"
        )


def read_figures(path: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a cell that results, tables and plots count with.

    Args:
        path: Of the cell's `metrics.json`.
        stages: That the cell was trained by.

    Raises:
        InputError: The file is damaged.
    """
    try:
        metrics = read_json(path)
        figures = {key: metrics[key] for key in _FIGURES} | {"tokens": _object(metrics, "data")["tokens"]}
        _check_depth(figures, _DEEPEST)
        _check_figures(figures, stages)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: damaged ({reason}); delete {path.parent} and use --resume") from error
    return figures


def _check_figures(figures: dict[str, Any], stages: Sequence[str]) -> None:
    """Raise ValueError, TypeError or KeyError where a figure is none that a conversion writes."""
    for key, least in (("dense", 0.5), ("routed", 0.5), ("ratio", 1 / _MOST)):
        _number(_object(figures, "perplexity"), key, least, _MOST)
    for key in ("realized", "attention", "ffn"):
        _number(_object(figures, "sparsity"), key, -_SLACK, 1 + _SLACK)
    _number(figures, "flops_ratio", 0, _MOST)
    if type(figures["tokens"]) is not int:
        raise TypeError("tokens are no whole number")
    _object(figures, "seconds")
    for stage in dict.fromkeys([*stages, *_object(figures, "stages")]):
        for key in ("seconds", "cpu_seconds"):  # some are divided by
            _number(_object(figures["stages"], stage), key, 1e-9, 1e12)
    for name in _object(figures, "units"):
        if not _UNIT.fullmatch(name):
            raise ValueError("units hold a name that is none")
        unit = _object(figures["units"], name)
        _number(unit, "keep_ratio", -_SLACK, 1 + _SLACK)
        if unit["recoverability"] == unit["recoverability"]:  # no number where a forecast was none
            _number(unit, "recoverability", -2, 2)


def _differing(before: Any, now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of every setting that differs, as `--set` takes it, and what it was and is."""
    for key, value in now.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict):
            yield from _differing(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key}", old, value


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    found = holder[key]
    if not isinstance(found, dict):
        raise TypeError(f"{key} is no object")
    return found


def _number(holder: dict[str, Any], key: str, least: float, most: float) -> None:
    if type(holder[key]) not in (int, float) or not least <= holder[key] <= most:
        raise ValueError(f"{key} is no number from {least:g} to {most:g}")


def _check_depth(value: Any, levels: int) -> None:
    """Refuse what is nested deeper than figures are: it is written again, which fails where reading did not."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if inner and not levels:
        raise ValueError("nested too deeply")
    for one in inner:
        _check_depth(one, levels - 1)


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:1000]
