"""`irc_config.json` of a bundle: read and checked, value by value, before anything is made from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.atomic import replaced
from irc.files.untrusted import read_json
from irc.model.routed import RoutingSpec
from irc.recipe.recipe import recipe_from

FORMAT_VERSION = 1  # a bundle of every version up to it loads: tests/data holds one of each
CONFIG = "irc_config.json"
_LARGEST = 1e30
_SLACK = 1e-6  # a share is a mean, and sums are rounded


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check `irc_config.json`.

    Args:
        folder: Of a bundle.

    Raises:
        InputError: It is missing, damaged, or of a newer format.
    """
    path = folder / CONFIG
    try:
        old = None if folder.exists() else replaced(folder)
        missing = not path.is_file()
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error}); give another folder") from error
    if old is not None:
        raise InputError(f"{folder}: a save was killed while it replaced this bundle; the whole one before is {old}")
    if missing:
        raise InputError(f"{folder}: not a bundle ({CONFIG} is missing); make one with irc convert")
    try:
        config = read_json(path)
        version = config["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}, expected a number from 1 to {FORMAT_VERSION}")
        if version <= FORMAT_VERSION:
            _check(config)
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {str(error)[:300]}); convert again") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{folder}: bundle format {version} is newer than this irc reads ({FORMAT_VERSION}); upgrade irc"
        )
    return config


def _check(config: dict[str, Any]) -> None:
    """Raise where a value is of a kind that `irc convert` never writes."""
    base, spec = config["base"], config["spec"]
    _texts(base["name"], base["sha256"], config["adapter_sha256"])
    if base.get("revision") is not None:
        _texts(base["revision"])
    if type(RoutingSpec(**spec).rank) is not int:
        raise TypeError("rank is no integer")
    recipe = recipe_from(
        {key: value for key, value in spec.items() if key != "reads"}
        | {"router": {"reads": spec.get("reads", "")}, "lora": config.get("lora") or {}}
        | {key: config[key] for key in ("kv_policy", "kv_threshold") if key in config}
    )
    recipe.check()
    names = set()
    for unit in config["units"]:
        _texts(unit["name"])
        names.add(unit["name"])
        _shares(*(unit[key] for key in ("calibration_keep", "keep_ratio") if unit.get(key) is not None))
        if unit.get("recoverability") is not None:
            _numbers(unit["recoverability"])
    for part in ("sparsity", "data"):
        if not isinstance(config.get(part) or {}, dict):
            raise TypeError(f"{part} holds no keys and values")
    _shares(*(value for value in (config.get("sparsity") or {}).values() if value is not None))
    data = config.get("data") or {}
    _texts(*(data[key] for key in ("name", "fingerprint") if key in data))
    if "seq_len" in data and (type(data["seq_len"]) is not int or data["seq_len"] < 2):
        raise ValueError(f"data.seq_len is {str(data['seq_len'])[:80]}")
    before = -math.inf
    for point in config.get("dial") or []:
        _numbers(*point["shift"].values())
        _shares(point["sparsity"], *point["keep"].values())
        if point["sparsity"] < before or not names == point["shift"].keys() == point["keep"].keys():
            raise ValueError("dial is out of order, or of other units")
        before = point["sparsity"]


def _texts(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{str(value)[:80]} is no text")


def _numbers(*values: Any) -> None:
    for value in values:
        if type(value) not in (int, float) or not abs(value) < _LARGEST:  # neither is NaN
            raise TypeError(f"{str(value)[:80]} is no number that can be meant")


def _shares(*values: Any) -> None:
    _numbers(*values)
    for value in values:
        if not -_SLACK <= value <= 1 + _SLACK:
            raise ValueError(f"{value:g} is no share between 0 and 1")
