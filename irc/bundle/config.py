"""`irc_config.json` as typed values, all of them checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from irc.bundle.layout import CONFIG, FORMAT_VERSION
from irc.errors import InputError
from irc.files.atomic import find_replaced
from irc.files.untrusted import read_json
from irc.model.routed import RoutingSpec
from irc.recipe.checked import Checked
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.recipe import recipe_from
from irc.recipe.stages import LoraRecipe
from irc.recipe.target import Target, TargetKind, target_of
from passes.match import Unit

_LARGEST = 1e30
_SLACK = 1e-6  # a share is a mean, and sums are rounded

Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
Fraction = Annotated[float, Field(ge=-_SLACK, le=1 + _SLACK)]


class Saved(Checked):
    """A part of the file. It may hold other keys, which a newer irc wrote."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class SavedBase(Saved):
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


class UnitFigures(Saved):
    """What was measured of one unit; None where it was not.

    Attributes:
        keep_ratio: Share of the evaluation text that the unit executes.
        recoverability: Mean cosine between its forecast and its output.
        calibration_keep: Share of the calibration text that it executes.
    """

    keep_ratio: Fraction | None = None
    recoverability: Number | None = None
    calibration_keep: Fraction | None = None


class SparsityFigures(Saved):
    """Shares of approximated (token, unit) pairs: the target, and what the evaluation measured; None if unknown."""

    target: Fraction | None = None
    realized: Fraction | None = None
    attention: Fraction | None = None
    ffn: Fraction | None = None


class DialPoint(Saved):
    """The thresholds of one target; one of `sparsity` and `flops` is set.

    Attributes:
        sparsity: Share of approximated (token, unit) pairs.
        flops: FLOPs ratio, routed over dense.
        shift: What to add to the execute logit of each unit.
        keep: What each unit then executes of the calibration text.
        realized: What was reached on it.
    """

    sparsity: Fraction | None = None
    flops: Fraction | None = None
    shift: dict[str, Number]
    keep: dict[str, Fraction]
    realized: Number | None = None

    @property
    def target(self) -> Target:
        """The target that the thresholds are for."""
        found = target_of(self.sparsity, self.flops)
        if found is None:
            raise ValueError("a point of the dial has no target")
        return found


class EvaluationText(Saved):
    """The text of a conversion: its name, the hash of its documents, tokens per window. None if unknown."""

    name: str | None = None
    fingerprint: str | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None


class _SavedUnit(UnitFigures):
    name: str


class _File(Saved):
    """The keys of the file that are read; what is inserted and stored (`spec`, `kv_policy`, `lora`) is a recipe's."""

    base: SavedBase
    spec: dict[str, Any]
    adapter_sha256: str
    units: list[_SavedUnit]
    target: dict[TargetKind, Fraction] | None = None
    sparsity: SparsityFigures | None = None
    dial: list[DialPoint] | None = None
    data: EvaluationText | None = None
    seed: int | None = None
    lora: dict[str, Any] | None = None
    lora_sha256: str | None = None

    @model_validator(mode="after")
    def _check_dial(self) -> Self:
        names, points = {unit.name for unit in self.units}, self.dial or []
        targets = [point.target for point in points]
        if targets != sorted(targets) or len({target.kind for target in targets}) > 1:
            raise ValueError("dial is out of order")
        if any(not names == point.shift.keys() == point.keep.keys() for point in points):
            raise ValueError("dial is of other units")
        return self


@dataclass(frozen=True)
class Measured:
    """What is known of a model's units and of the text that they were measured on.

    Attributes:
        units: Figures of each unit.
        sparsity: Shares of approximated pairs.
        text: The text.
        target: What was to be reached; None if unknown.
    """

    units: Mapping[str, UnitFigures] = field(default_factory=dict)
    sparsity: SparsityFigures = field(default_factory=SparsityFigures)
    text: EvaluationText = field(default_factory=EvaluationText)
    target: Target | None = None

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Measured:
        """Take the figures that a configuration holds from those of `metrics.json`, any of which may be missing."""
        keep, units = metrics.get("calibration_keep", {}), metrics.get("units", {})
        names = dict.fromkeys([*units, *keep])
        return cls(
            {name: UnitFigures(**units.get(name, {}) | {"calibration_keep": keep.get(name)}) for name in names},
            SparsityFigures(**metrics.get("sparsity", {})),
            EvaluationText(**metrics.get("data", {})),
            _target(metrics.get("target"), metrics.get("sparsity", {}).get("target")),
        )


@dataclass(frozen=True)
class BundleConfig:
    """What `irc_config.json` says.

    Attributes:
        base: The base model.
        spec: What is inserted.
        adapter_sha256: Of the routers' and forecasters' file.
        measured: Figures of the units.
        dial: Thresholds of the own target and of others, in ascending order.
        key_policy: Whose keys and values are stored.
        seed: Of the conversion.
        lora: How its LoRA adapters were made; None without.
        lora_sha256: Of their file.
    """

    base: SavedBase
    spec: RoutingSpec
    adapter_sha256: str
    measured: Measured = field(default_factory=Measured)
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
            "base": self.base.model_dump(),
            "spec": asdict(self.spec),
            "units": [
                {"name": unit.name, "kind": unit.kind, "layer": unit.layer, "width": unit.width}
                | figures.get(unit.name, UnitFigures()).model_dump(exclude_none=True)
                for unit in units
            ],
            "target": None if self.measured.target is None else self.measured.target.to_dict(),
            "sparsity": self.measured.sparsity.model_dump(exclude_none=True),
            "dial": [point.model_dump(exclude_none=True) for point in self.dial],
            "data": self.measured.text.model_dump(exclude_none=True),
            "kv_policy": self.key_policy.name,
            "kv_threshold": self.key_policy.threshold,
            "seed": self.seed,
            "lora": None if self.lora is None else self.lora.model_dump(),
            "lora_sha256": self.lora_sha256,
            "adapter_sha256": self.adapter_sha256,
        }


def _target(saved: Mapping[Any, float] | None, sparsity: float | None) -> Target | None:
    """Return the target that a file names; those of earlier versions name a sparsity only."""
    return target_of(saved.get("sparsity"), saved.get("flops")) if saved else target_of(sparsity, None)


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
    saved = _File(**config)
    spec = RoutingSpec(**saved.spec)
    recipe = recipe_from(
        {key: value for key, value in saved.spec.items() if key not in ("reads", "router_hidden")}
        | {"router": {"reads": spec.reads, "hidden": spec.router_hidden}, "lora": saved.lora or {}}
        | {key: config[key] for key in ("kv_policy", "kv_threshold") if key in config}
    )
    return BundleConfig(
        base=saved.base,
        spec=spec,
        adapter_sha256=saved.adapter_sha256,
        measured=Measured(
            {unit.name: UnitFigures(**unit.model_dump()) for unit in saved.units},
            saved.sparsity or SparsityFigures(),
            saved.data or EvaluationText(),
            _target(saved.target, None if saved.sparsity is None else saved.sparsity.target),
        ),
        dial=tuple(saved.dial or ()),
        key_policy=KeyPolicy(recipe.kv_policy, recipe.kv_threshold),
        seed=saved.seed,
        lora=recipe.lora if saved.lora else None,
        lora_sha256=saved.lora_sha256,
    )
