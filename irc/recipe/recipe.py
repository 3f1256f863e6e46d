"""The recipe: every choice of a conversion, as dataclasses with a help text for each field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import operator
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.strict_yaml import parse, shown
from irc.recipe.policies import Policy, policy_named
from irc.recipe.presets import read_recipe
from irc.recipe.stages import LffRecipe, LoraRecipe, RouterRecipe, setting

STAGES = ("lff", "router", "lora")
PRECISIONS = ("auto", "fp32", "bf16")
EVAL_SPLITS = ("heldout", "validation")
KEY_POLICIES = ("full", "reduced")
_LARGEST_SEED, _LARGEST_INTEGER = 2**32, 2**53
_LEAST = {
    "eval_tokens": 0,
    "checkpoint_seconds": 0,
    "lff.tokens": 1,
    "lff.steps": 0,
    "lff.batch_size": 1,
    "router.steps": 1,
    "router.batch_size": 1,
    "router.calibration_tokens": 1,
    "lff.ridge": 0,
    "lff.lr": 0,
    "router.lr": 0,
    "router.forecaster_lr": 0,
    "lora.lr": 0,
    "lora.forecaster_lr": 0,
    "lora.router_lr": 0,
    "router.temperature_start": 0.001,
    "router.temperature_end": 0.001,
    "router.sparsity_weight": 0,
    "router.cosine_weight": 0,
    "router.clip": 0,
    "router.noise_end": 0,
    "router.entropy_weight": 0,
    "router.teach_steps": -1,
    "lora.steps": 1,
    "lora.batch_size": 1,
    "lora.rank": 1,
    "lora.alpha": 1,
}


@dataclass
class Recipe:
    """Everything that decides what `irc convert` makes."""

    model: str = setting("demo", "local folder, hub id, or demo")
    data: str = setting("stdlib", "text file, folder, .jsonl, .parquet, hf:NAME, or stdlib")
    policy: str = setting("informed", "routing policy: informed, skipgpt, mod, random or static")
    sparsity: float = setting(0.25, "share of (token, unit) pairs to approximate, 0 to 1")
    rank: int = setting(0, "forecaster rank; 0 means min(100, hidden size / 10)")
    forecaster: str = setting("linear", "linear or silu")
    stages: list[str] = field(
        default_factory=list, metadata={"help": "stages, in order; none means those that the policy needs"}
    )
    dial: list[float] = field(
        default_factory=list,
        metadata={"help": "sparsities whose thresholds the bundle keeps, to run at any between"},
    )
    kv_policy: str = setting("full", "whose keys and values are stored: full, or reduced (see kv_threshold)")
    kv_threshold: float = setting(0.5, "reduced: no tokens that attention units skipping at least this share skip")
    seq_len: int = setting(256, "tokens a window")
    eval_tokens: int = setting(32_768, "held-out tokens that the closing evaluation reads; 0 means all")
    eval_split: str = setting("heldout", "text of the closing evaluation: heldout, or validation to choose settings by")
    seed: int = setting(0, "seed of data order, noise and initial weights")
    device: str = setting("auto", "cpu, cuda, cuda:N, mps, or auto")
    dtype: str = setting("auto", "weights' data type: fp32, bf16, or auto (fp32; bf16 for checkpoints of over 2 GB)")
    precision: str = setting("auto", "autocast in training: fp32, bf16, or auto (bf16 where the processor has it)")
    activation_checkpointing: bool = setting(False, "keep only layers' inputs for the backward pass: less memory")
    checkpoint_seconds: float = setting(30.0, "seconds between checkpoints inside a stage")
    lff: LffRecipe = field(default_factory=LffRecipe, metadata={"help": "stage lff"})
    router: RouterRecipe = field(default_factory=RouterRecipe, metadata={"help": "stage router"})
    lora: LoraRecipe = field(default_factory=LoraRecipe, metadata={"help": "stage lora"})

    def check(self) -> None:
        """Refuse values that cannot work together.

        Raises:
            InputError: Names the field, its value and what it may be.
        """
        if not 0.0 <= self.sparsity <= 1.0:
            raise InputError(f"sparsity is {self.sparsity}; give a share between 0 and 1, such as 0.25")
        policy = policy_named(self.policy)
        if any(type(share) not in (int, float) or not 0 <= share <= 1 for share in self.dial):
            raise InputError(f"dial is {shown(self.dial)}; give shares between 0 and 1, such as 0.1,0.3,0.5")
        if self.dial and (policy.capacity or not policy.learns):
            raise InputError(f"policy {self.policy} has no threshold to turn; leave --dial out")
        if self.forecaster not in ("linear", "silu"):
            raise InputError(f"forecaster is '{self.forecaster}'; choose linear or silu")
        if not 0.0 <= self.router.distill <= 1.0:
            raise InputError(f"router.distill is {self.router.distill}; give a share between 0 and 1")
        self.router.check(policy.forecasts)
        if self.dial and self.router.budget != "model":
            raise InputError(
                f"dial needs router.budget model, not '{self.router.budget}': it sets one sparsity for all"
            )
        if self.eval_split not in EVAL_SPLITS:
            raise InputError(f"eval_split is '{self.eval_split}'; choose from {', '.join(EVAL_SPLITS)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision is '{self.precision}'; choose from {', '.join(PRECISIONS)}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or sorted(self.stages, key=STAGES.index) != self.stages:
            raise InputError(f"stages are {', '.join(self.stages)}; give some of {', '.join(STAGES)}, in this order")
        needed = policy.stages
        if self.stages and [stage for stage in self.stages if stage != "lora"] != needed:
            raise InputError(
                f"stages are {', '.join(self.stages)}; with policy {self.policy} they are {','.join(needed)}, "
                f"and lora after them if wanted ({_why(policy)})"
            )
        check_key_policy(self.kv_policy, self.kv_threshold)
        if abs(self.seed) > _LARGEST_SEED:
            raise InputError(f"seed is {self.seed}; give one between -{_LARGEST_SEED} and {_LARGEST_SEED}")
        if self.rank < 0:
            raise InputError(f"rank is {self.rank}; give a positive number, or 0 for the default")
        if self.seq_len < 2:
            raise InputError(f"seq_len is {self.seq_len}; a window needs at least 2 tokens")
        if not 0 <= self.lora.dropout < 1:
            raise InputError(f"lora.dropout is {self.lora.dropout}; give a share of at least 0 and below 1")
        if not self.lora.targets:
            raise InputError("lora.targets is empty; give names of linears, such as [q_proj, v_proj]")
        for name, least in _LEAST.items():
            value = operator.attrgetter(name)(self)
            if not value >= least:  # neither is NaN
                raise InputError(f"{name} is {value}; give at least {least}")
        for name, value, _ in recipe_fields(self):
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} is {value}; give a finite number")

    def rank_for(self, width: int) -> int:
        """Return the forecaster rank for a hidden size.

        Raises:
            InputError: The rank is larger than the hidden size.
        """
        rank = self.rank or default_rank(width)
        if rank > width:
            raise InputError(f"rank is {rank}, the model's hidden size is {width}; give a rank of at most {width}")
        return rank

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for YAML or JSON."""
        return dataclasses.asdict(self)


def default_rank(width: int) -> int:
    """Forecaster rank for a hidden size: the paper's 100 for 3,072 and above, a tenth of smaller ones."""
    return max(1, min(100, width // 10))


def _why(policy: Policy) -> str:
    if policy.forecasts:
        return "routers need forecasters, and without the stage router nothing is routed"
    return "it has no forecasters, and without the stage router nothing is routed"


def check_key_policy(name: str, threshold: float) -> None:
    """Refuse what is no key/value policy.

    Raises:
        InputError: Names the field, its value and what it may be.
    """
    if name not in KEY_POLICIES:
        raise InputError(f"kv_policy is '{name}'; choose from {', '.join(KEY_POLICIES)}")
    if not 0.0 <= threshold <= 1.0:
        raise InputError(f"kv_threshold is {threshold}; give a share between 0 and 1, such as 0.5")


def load_recipe(path: Path | None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides.

    Args:
        path: YAML file or name of a ready recipe, or None for the defaults.
        overrides: Such as `router.steps=500`; values are YAML.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value has the wrong type.
    """
    recipe = Recipe() if path is None else recipe_from(read_recipe(path), f"recipe {path}")
    for text in overrides:
        override(recipe, text)
    return recipe


def override(recipe: Recipe, text: str) -> None:
    """Set one field of a recipe.

    Args:
        recipe: Changed in place.
        text: Such as `router.steps=500`; the value is YAML.

    Raises:
        InputError: There is no such field, or the value does not fit it.
    """
    key, separator, value = (part.strip() for part in text.partition("="))
    if not (key and separator):
        missing = "the key before = is missing; " if separator else ""
        raise InputError(f"--set {text}: {missing}expected key=value, such as router.steps=500")
    try:
        parsed = parse(value)
    except ValueError as error:
        raise InputError(f"--set {key}={value[:40]}: the value cannot be read as YAML ({error})") from error
    target: Any = recipe
    prefix = ""
    *parts, leaf = key.split(".")
    with _naming("recipe"):
        for part in parts:
            target, prefix = getattr(target, _known(target, part, prefix, key)), f"{prefix}{part}."
        _assign(target, _known(target, leaf, prefix, key), parsed, key)


def recipe_fields(part: Any = None, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Return (name as `--set` takes it, default, help) of every field of a recipe, in order."""
    found: list[tuple[str, Any, str]] = []
    part = part or Recipe()
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if dataclasses.is_dataclass(value):
            found += recipe_fields(value, f"{prefix}{entry.name}.")
        else:
            found.append((prefix + entry.name, value, entry.metadata["help"]))
    return found


def text_name(split: str) -> str:
    """Return what people call the text of the closing evaluation."""
    return "held-out text" if split == "heldout" else f"{split} text"


def recipe_from(data: dict[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from plain data; unknown keys are refused with the nearest right one, in the name of `source`."""
    recipe = Recipe()
    with _naming(source):
        _fill(recipe, data, "")
    return recipe


@contextlib.contextmanager
def _naming(source: str) -> typing.Iterator[None]:
    """Begin what is refused inside with where it was read."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _fill(target: Any, data: dict[str, Any], prefix: str) -> None:
    for key, value in data.items():
        name = _known(target, str(key), prefix, prefix + str(key))
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key}: expected keys and values, found {shown(value)}")
            _fill(current, value, f"{prefix}{key}.")
        else:
            _assign(target, name, value, prefix + str(key))


def _known(target: Any, key: str, prefix: str, full: str) -> str:
    names = [entry.name for entry in dataclasses.fields(target)] if dataclasses.is_dataclass(target) else []
    if key in names:
        return key
    if not names:
        raise InputError(f"unknown key {full}; there is nothing below {prefix[:-1]}")
    near = difflib.get_close_matches(key, names, n=1)
    below = f" below {prefix[:-1]}" if prefix else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known{below} are {', '.join(names)}"
    raise InputError(f"unknown key {full}; {hint}")


def _assign(target: Any, name: str, value: Any, full: str) -> None:
    wanted = typing.get_type_hints(type(target))[name]
    origin: Any = wanted.__origin__ if isinstance(wanted, types.GenericAlias) else wanted
    if dataclasses.is_dataclass(origin):
        raise InputError(
            f"{full} is {shown(value)}, but it is a group of fields; set one of them, such as {full}.steps"
        )
    if origin is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise InputError(f"{full} is larger than any that can be meant; give a smaller number")
    if (
        not isinstance(value, origin)
        or (isinstance(value, bool) and origin is not bool)
        or (wanted == list[str] and not all(isinstance(part, str) for part in value))
    ):
        raise InputError(f"{full} is {shown(value)}; expected {getattr(origin, '__name__', origin)}")
    setattr(target, name, value)
