"""`irc_config.json` as typed values: read and checked one by one before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from irc.bundle.layout import CONFIG, FORMAT_VERSION
from irc.errors import InputError
from irc.files.atomic import find_replaced
from irc.files.untrusted import read_json
from irc.model.routed import RoutingSpec
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.recipe import recipe_from
from irc.recipe.stages import LoraRecipe
from passes.match import Unit

_LARGEST = 1e30
_SLACK = 1e-6  # a share is a mean, and sums are rounded


@dataclass(frozen=True)
class SavedBase:
    """The base model that a bundle names.

    Attributes:
        name: Folder or hub id.
        sha256: Over its weights.
        revision: Of a hub id.
        architecture: Its `model_type`.
    """

    name: str
    sha256: str
    revision: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class UnitFigures:
    """What was measured of one unit; None where it was not.

    Attributes:
        calibration_keep: Share of the calibration text that the unit executes.
        keep_ratio: Share of the evaluation text that it executes.
        recoverability: Mean cosine between its forecast and its output.
    """

    calibration_keep: float | None = None
    keep_ratio: float | None = None
    recoverability: float | None = None


@dataclass(frozen=True)
class SparsityFigures:
    """Shares of approximated (token, unit) pairs: the target, and what the evaluation measured; None if unknown."""

    target: float | None = None
    realized: float | None = None
    attention: float | None = None
    ffn: float | None = None


@dataclass(frozen=True)
class DialPoint:
    """The thresholds of one sparsity.

    Attributes:
        sparsity: Share of approximated (token, unit) pairs.
        shift: What to add to the execute logit of each unit.
        keep: What each unit then executes of the calibration text.
        realized: The share that was reached on it.
    """

    sparsity: float
    shift: Mapping[str, float]
    keep: Mapping[str, float]
    realized: float | None = None


@dataclass(frozen=True)
class EvaluationText:
    """The text of a conversion: its name, the hash of its documents, tokens per window. None if unknown."""

    name: str | None = None
    fingerprint: str | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Measured:
    """What is known of a model's units and of the text that they were measured on."""

    units: Mapping[str, UnitFigures] = field(default_factory=dict)
    sparsity: SparsityFigures = SparsityFigures()
    text: EvaluationText = EvaluationText()

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Measured:
        """Take the figures that a configuration holds from those of `metrics.json`, any of which may be missing."""
        keep, units = metrics.get("calibration_keep", {}), metrics.get("units", {})
        figures = {}
        for name in dict.fromkeys([*units, *keep]):
            unit = units.get(name, {})
            figures[name] = UnitFigures(keep.get(name), unit.get("keep_ratio"), unit.get("recoverability"))
        text = EvaluationText()
        if "data" in metrics:
            text = EvaluationText(*(metrics["data"][key] for key in ("name", "fingerprint", "seq_len")))
        return cls(figures, _sparsity(metrics.get("sparsity", {})), text)


@dataclass(frozen=True)
class BundleConfig:
    """What `irc_config.json` says.

    Attributes:
        base: The base model.
        spec: What is inserted.
        adapter_sha256: Of the routers' and forecasters' file.
        measured: Figures of the units.
        dial: Thresholds of other sparsities, in ascending order.
        key_policy: Whose keys and values are stored.
        seed: Of the conversion.
        lora: How its LoRA adapters were made; None without.
        lora_sha256: Of their file.
    """

    base: SavedBase
    spec: RoutingSpec
    adapter_sha256: str
    measured: Measured = Measured()
    dial: tuple[DialPoint, ...] = ()
    key_policy: KeyPolicy = field(default_factory=KeyPolicy)
    seed: int | None = None
    lora: LoraRecipe | None = None
    lora_sha256: str | None = None

    def to_json(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Return the object of `irc_config.json`.

        Args:
            units: Of the model, in order.
        """
        figures = self.measured.units
        return {
            "format_version": FORMAT_VERSION,
            "base": {
                "name": self.base.name,
                "revision": self.base.revision,
                "sha256": self.base.sha256,
                "architecture": self.base.architecture,
            },
            "spec": asdict(self.spec),
            "units": [
                {"name": unit.name, "kind": unit.kind, "layer": unit.layer, "width": unit.width}
                | _unit_json(figures.get(unit.name, UnitFigures()))
                for unit in units
            ],
            "sparsity": _known(asdict(self.measured.sparsity)),
            "dial": [_known(asdict(point)) for point in self.dial],
            "data": _known(asdict(self.measured.text)),
            "kv_policy": self.key_policy.name,
            "kv_threshold": self.key_policy.threshold,
            "seed": self.seed,
            "lora": None if self.lora is None else self.lora.model_dump(),
            "lora_sha256": self.lora_sha256,
            "adapter_sha256": self.adapter_sha256,
        }


def check_present(folder: Path) -> None:
    """Refuse a folder that holds no bundle, and name the whole one if a save was killed while it replaced it.

    Raises:
        InputError: Says what is missing.
    """
    try:
        old = None if folder.exists() else find_replaced(folder)
        missing = not (folder / CONFIG).is_file()
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error}); give another folder") from error
    if old is not None:
        raise InputError(f"{folder}: a save was killed while it replaced this bundle; the previous bundle is {old}")
    if missing:
        raise InputError(f"{folder}: not a bundle ({CONFIG} is missing); make one with irc convert")


def read_config(folder: Path) -> BundleConfig:
    """Read and check `irc_config.json`.

    Args:
        folder: Of a bundle.

    Raises:
        InputError: The file is missing, damaged, or of a newer format.
    """
    check_present(folder)
    path = folder / CONFIG
    try:
        config = read_json(path)
        version = config["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}, expected a number from 1 to {FORMAT_VERSION}")
        if version <= FORMAT_VERSION:
            return _checked(config)
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {str(error)[:300]}); convert again") from error
    raise InputError(f"{folder}: bundle format {version} is newer than this irc reads ({FORMAT_VERSION}); upgrade irc")


def _checked(config: dict[str, Any]) -> BundleConfig:
    """Return the values; raise where one is of a kind that `irc convert` never writes."""
    base, lora = config["base"], config.get("lora")
    _check_texts(base["name"], base["sha256"], config["adapter_sha256"])
    if base.get("revision") is not None:
        _check_texts(base["revision"])
    spec = RoutingSpec(**config["spec"])
    if type(spec.rank) is not int:
        raise TypeError("rank is not an integer")
    recipe = recipe_from(
        {key: value for key, value in config["spec"].items() if key != "reads"}
        | {"router": {"reads": spec.reads}, "lora": lora or {}}
        | {key: config[key] for key in ("kv_policy", "kv_threshold") if key in config}
    )
    units = {_name(unit): _unit_figures(unit) for unit in config["units"]}
    return BundleConfig(
        base=SavedBase(base["name"], base["sha256"], base.get("revision"), base.get("architecture")),
        spec=spec,
        adapter_sha256=config["adapter_sha256"],
        measured=Measured(units, _sparsity(config.get("sparsity") or {}), _text(config.get("data") or {})),
        dial=_dial(config.get("dial") or [], units.keys()),
        key_policy=KeyPolicy(recipe.kv_policy, recipe.kv_threshold),
        seed=config.get("seed"),
        lora=recipe.lora if lora else None,
        lora_sha256=config.get("lora_sha256"),
    )


def _name(unit: dict[str, Any]) -> str:
    name = unit["name"]
    _check_texts(name)
    return str(name)


def _unit_figures(unit: dict[str, Any]) -> UnitFigures:
    found = UnitFigures(unit.get("calibration_keep"), unit.get("keep_ratio"), unit.get("recoverability"))
    _check_shares(value for value in (found.calibration_keep, found.keep_ratio) if value is not None)
    if found.recoverability is not None:
        _check_numbers([found.recoverability])
    return found


def _sparsity(saved: dict[str, Any]) -> SparsityFigures:
    if not isinstance(saved, dict):
        raise TypeError("sparsity does not hold keys and values")
    _check_shares(value for value in saved.values() if value is not None)
    return SparsityFigures(*(saved.get(key) for key in ("target", "realized", "attention", "ffn")))


def _text(saved: dict[str, Any]) -> EvaluationText:
    if not isinstance(saved, dict):
        raise TypeError("data does not hold keys and values")
    _check_texts(*(saved[key] for key in ("name", "fingerprint") if key in saved))
    if "seq_len" in saved and (type(saved["seq_len"]) is not int or saved["seq_len"] < 2):
        raise ValueError(f"data.seq_len is {str(saved['seq_len'])[:80]}")
    return EvaluationText(saved.get("name"), saved.get("fingerprint"), saved.get("seq_len"))


def _dial(saved: Sequence[dict[str, Any]], units: Iterable[str]) -> tuple[DialPoint, ...]:
    points: list[DialPoint] = []
    before, names = -math.inf, set(units)
    for entry in saved:
        point = DialPoint(entry["sparsity"], entry["shift"], entry["keep"], entry.get("realized"))
        _check_numbers(point.shift.values())
        _check_shares([point.sparsity, *point.keep.values()])
        if point.sparsity < before or not names == point.shift.keys() == point.keep.keys():
            raise ValueError("dial is out of order, or of other units")
        before = point.sparsity
        points.append(point)
    return tuple(points)


def _unit_json(figures: UnitFigures) -> dict[str, float | None]:
    measured = _known({"keep_ratio": figures.keep_ratio, "recoverability": figures.recoverability})
    return measured | {"calibration_keep": figures.calibration_keep}


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check_texts(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{str(value)[:80]} is not a text")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if type(value) not in (int, float) or not abs(value) < _LARGEST:  # NaN is not below it either
            raise TypeError(f"{str(value)[:80]} is not a plausible number")


def _check_shares(values: Iterable[Any]) -> None:
    for value in values:
        _check_numbers([value])
        if not -_SLACK <= value <= 1 + _SLACK:
            raise ValueError(f"{value:g} is not a share between 0 and 1")
