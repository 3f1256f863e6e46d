"""Checks what a comparison left on disk before results are computed from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from irc.errors import InputError
from irc.files.untrusted import first_line, read_json
from irc.model.checkpoint import BaseModel
from irc.recipe.checked import Checked, Natural
from irc.recipe.layers import Layer, build

_LARGEST = 1e306  # a perplexity is at most exp(700), divided by another
_DEEPEST = 8
_SLACK = 1e-6  # shares are means, and sums are rounded
_LARGEST_COSINE = 2  # generous: rounding takes a cosine a little beyond 1
_UNIT_NAME = r"[A-Za-z0-9_.]{1,200}"  # plots show it
_FIGURES = ("perplexity", "fidelity", "texts", "sparsity", "flops_ratio", "units", "seconds", "stages")


def _cosine(value: float) -> float:
    """Accept a cosine, or NaN, which means that no token was forecast."""
    if not (math.isnan(value) or abs(value) <= _LARGEST_COSINE):
        raise ValueError("give a cosine")
    return value


def _unit_name(name: str) -> str:
    if not re.fullmatch(_UNIT_NAME, name):
        raise ValueError("expected the name of a module")
    return name


Perplexity = Annotated[float, Field(ge=0.5, le=_LARGEST)]
Share = Annotated[float, Field(ge=-_SLACK, le=1 + _SLACK)]
Seconds = Annotated[float, Field(ge=1e-9, le=1e12)]  # some are divided by
Cosine = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_cosine)]
UnitName = Annotated[str, AfterValidator(_unit_name)]


class _Saved(Checked):
    """Values that a command wrote earlier; it may have written others beside them."""

    model_config = ConfigDict(extra="ignore")


class _Perplexities(_Saved):
    dense: Perplexity
    routed: Perplexity
    ratio: Annotated[float, Field(ge=1 / _LARGEST, le=_LARGEST)]


class _Skipped(_Saved):
    realized: Share
    attention: Share
    ffn: Share


class _Unit(_Saved):
    keep_ratio: Share
    recoverability: Cosine


class _Fidelity(_Saved):
    kl: Annotated[float, Field(ge=0, le=_LARGEST)]
    kl_p99: Annotated[float, Field(ge=0, le=_LARGEST)]
    top1: Share


class _TextFigures(_Saved):
    name: str
    fidelity: _Fidelity | None = None
    flops_ratio: Annotated[float, Field(ge=0, le=_LARGEST)] = 1.0


class _StageTime(_Saved):
    seconds: Seconds
    cpu_seconds: Seconds


class Figures(_Saved):
    """The figures of a cell that results, tables and plots are computed from."""

    perplexity: _Perplexities
    fidelity: _Fidelity | None = None  # missing before version 0.2
    texts: list[_TextFigures] = Field(default_factory=list)
    sparsity: _Skipped
    flops_ratio: Annotated[float, Field(ge=0, le=_LARGEST)]
    units: dict[UnitName, _Unit]
    seconds: dict[str, Any]
    stages: dict[str, _StageTime]
    tokens: Natural


class _Text(_Saved):
    name: Any = None
    fingerprint: Any


class Manifest(_Saved):
    """What `compare.json` says about the comparison that it belongs to."""

    model: Any = None
    base_identity: Any
    data: _Text
    recipe: dict[str, Any]


def check_same(path: Path, manifest: Mapping[str, Any], base: BaseModel) -> None:
    """Compare the manifest of a comparison with that of the one that would continue it.

    Args:
        path: Of `compare.json`.
        manifest: What it would hold now.
        base: The model that would be compared.

    Raises:
        InputError: It is damaged, or another model, text or setting was compared.
    """
    output = path.parent
    try:
        before = build(Manifest, [Layer("", read_json(path))])
    except (ValueError, InputError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); start over", options=("force",)) from error
    if not base.has_identity(before.base_identity):
        raise InputError(
            f"{output}: compares another model ({_shown(before.model)}); give another folder", options=("output",)
        )
    if before.data.fingerprint != manifest["data"]["fingerprint"]:
        raise InputError(
            f"{output}: compares on another text ({_shown(before.data.name)}); give another folder",
            options=("output",),
        )
    for key, old, new in _differing(before.recipe, manifest["recipe"]):
        raise InputError(
            f"{output}: was started with {key} = {_shown(old)}, but now it is {new}; resume with the same settings, or "
            "give another folder",
            options=("output",),
        )


def read_figures(path: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a cell that results, tables and plots are computed from.

    Args:
        path: Of the cell's `metrics.json`.
        stages: That trained the cell.

    Raises:
        InputError: The file is damaged.
    """
    try:
        metrics = read_json(path)
        figures = {key: metrics[key] for key in _FIGURES if key in metrics}
        if isinstance(data := metrics.get("data"), dict) and "tokens" in data:
            figures["tokens"] = data["tokens"]
        _check_depth(figures, _DEEPEST)
        checked = build(Figures, [Layer("", figures)])
        for stage in stages:
            if stage not in checked.stages:
                raise ValueError(f"stages.{stage} is missing")
    except (OSError, ValueError, InputError) as error:
        raise InputError(
            f"{path}: damaged ({first_line(error)}); delete {path.parent} and resume", options=("resume",)
        ) from error
    return figures


def _differing(before: Any, now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every setting that differs, by the name that `--set` takes, with its old and new value."""
    for key, value in now.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict):
            yield from _differing(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key}", old, value


def _check_depth(value: Any, levels: int) -> None:
    """Refuse nesting deeper than figures have: writing them again would fail where reading did not."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if inner and not levels:
        raise ValueError("nested too deeply")
    for one in inner:
        _check_depth(one, levels - 1)


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:1000]
