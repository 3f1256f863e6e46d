"""The recipe: every choice of a conversion, with its default, its bounds and its help on the field."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from irc.dtypes import LONG_NAMES
from irc.errors import InputError
from irc.recipe.checked import Checked, Count, Natural, Real, Share
from irc.recipe.layers import Layer, build, setting_layer
from irc.recipe.policies import PolicyName, policy_named
from irc.recipe.presets import read_recipe
from irc.recipe.refusals import LARGEST_INTEGER, Conflict, shown_value
from irc.recipe.removed import without_removed
from irc.recipe.stages import STAGE_NAMES, LffRecipe, LoraRecipe, RouterRecipe, StageName, required_stages, stage_named
from irc.recipe.target import TARGET_KINDS, Target

SEQ_LEN = 1024
"""Default tokens per window, in models whose context is as long."""

TRAIN_SEQ_LEN = 256
"""Default tokens per window in training: longer ones take more time, and a step reads fewer texts."""

_LARGEST_SEED = 2**32


def _known_dtype(name: str) -> str:
    known = ("auto", *LONG_NAMES, *LONG_NAMES.values())
    if name not in known:
        raise ValueError(f"choose from {', '.join(known)}")
    return name


FromHome = Annotated[str, AfterValidator(os.path.expanduser)]
"""A name or a path; `~` is the home folder, as in a shell."""

Texts = Annotated[
    list[FromHome],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    PlainSerializer(lambda texts: texts[0] if len(texts) == 1 else texts),
]
"""Names of texts; a single one needs no list, and is written without one."""


class Recipe(Checked):
    """Everything that decides what `irc convert` makes.

    Values are checked when the recipe is made and when a field is set. Setting a field of a stage does not check it
    against the fields of other stages; `validated` does.
    """

    model: FromHome = Field(default="demo", description="local folder, Hugging Face Hub id, or demo")
    data: Texts = Field(
        default_factory=lambda: ["stdlib"],
        description="text file, folder, table (.jsonl, .json, .csv, .parquet), hf:NAME, stdlib, self; or a list",
    )
    data_weights: list[Annotated[Real, Field(ge=0)]] = Field(
        default_factory=list, description="share of each text in the mixture, in proportion; empty: equal shares"
    )
    self_tokens: Count = Field(default=65_536, description="tokens that the model writes if its text is self")
    self_seed: int = Field(default=0, ge=0, le=_LARGEST_SEED, description="seed of the text that the model writes")
    policy: PolicyName = Field(
        default="informed", description="routing policy: informed, skipgpt, mod, random, static or static-forecast"
    )
    sparsity: Share = Field(default=0.25, description="fraction of (token, unit) pairs to approximate, 0 to 1")
    flops: Real | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="target in place of sparsity: matrix-multiply FLOPs, routed over dense, such as 0.85",
    )
    rank: Natural = Field(default=0, description="forecaster rank of all units; 0 means min(100, hidden size / 10)")
    ffn_rank: Natural = Field(
        default=0, description="forecaster rank of FFN units; 0 means rank, or twice its default if rank is 0"
    )
    forecaster: Literal["linear", "silu"] = Field(
        default="linear", description="form of the forecaster: linear or silu"
    )
    stages: list[StageName] = Field(
        default_factory=list, description="stages to run, in order; empty runs those that the policy needs"
    )
    dial: list[Share] = Field(
        default_factory=list,
        description="targets to store thresholds for, of the kind of the target; the bundle can run at any in between",
    )
    kv_policy: Literal["full", "reduced"] = Field(
        default="full", description="which tokens' keys and values are stored: full, or reduced (see kv_threshold)"
    )
    kv_threshold: Share = Field(
        default=0.5,
        description="reduced: attention units that skip at least this share store nothing for skipped tokens",
    )
    seq_len: Annotated[int, Field(ge=2, le=LARGEST_INTEGER)] | None = Field(
        default=None,
        description="tokens per window of threshold, target and evaluation; null: 1,024, or the model's whole context",
    )
    train_seq_len: Annotated[int, Field(ge=2, le=LARGEST_INTEGER)] | None = Field(
        default=None,
        description="tokens per window in training; null: seq_len where it is given, otherwise at most 256",
    )
    eval_tokens: Natural = Field(
        default=16_384, description="held-out tokens that the final evaluation reads; 0 means all"
    )
    yardstick_tokens: Natural = Field(
        default=4096, description="tokens of each text of the yardstick in the final evaluation; 0 leaves it out"
    )
    eval_split: Literal["heldout", "validation"] = Field(
        default="heldout", description="text of the final evaluation: heldout, or validation for choosing settings"
    )
    seed: int = Field(
        default=0, ge=-_LARGEST_SEED, le=_LARGEST_SEED, description="seed of data order, noise and initial weights"
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:N, mps, or auto")
    dtype: Annotated[str, AfterValidator(_known_dtype)] = Field(
        default="auto",
        description="data type of the weights: fp32, bf16, or auto (fp32; bf16 for checkpoints over 2 GB)",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="autocast during training: fp32, bf16, or auto (bf16 on GPUs and with AMX)",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    checkpoint_seconds: Annotated[Real, Field(ge=0)] = Field(
        default=30.0, description="seconds between checkpoints within a stage"
    )
    lff: LffRecipe = Field(default_factory=LffRecipe, description="stage lff")
    router: RouterRecipe = Field(default_factory=RouterRecipe, description="stage router")
    lora: LoraRecipe = Field(default_factory=LoraRecipe, description="stage lora")

    alternatives: ClassVar[tuple[str, ...]] = TARGET_KINDS
    """Fields of which a source gives one at most; it then replaces the other of the sources below."""

    @model_validator(mode="before")
    @classmethod
    def _check_removed(cls, values: Any) -> Any:
        return without_removed(values)

    @property
    def target(self) -> Target:
        """What the conversion is to reach."""
        return Target("sparsity", self.sparsity) if self.flops is None else Target("flops", self.flops)

    @property
    def others_on_dial(self) -> list[float]:
        """The points of the dial whose thresholds have to be found: all but the target's own."""
        return [value for value in self.dial if value != self.target.value]

    @property
    def data_name(self) -> str:
        """The names of all texts, as messages show them."""
        return " + ".join(self.data)

    @model_validator(mode="after")
    def _check_data_weights(self) -> Self:
        weights, texts = self.data_weights, len(self.data)
        if weights and (len(weights) != texts or sum(weights) <= 0):
            raise Conflict(
                f"data_weights are {shown_value(weights)} for {texts} texts; give one number of at least 0 "
                "for each text, and one of them above 0",
                "data_weights",
                "data",
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.flops is None:
            return self
        if "sparsity" in self.model_fields_set:
            raise Conflict(
                f"sparsity is {self.sparsity} and flops is {self.flops}, but only one can be the target; leave one out",
                "sparsity",
                "flops",
            )
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        policy = policy_named(self.policy)
        if self.dial and (policy.capacity or not policy.learns):
            raise Conflict(f"policy {self.policy} has no threshold to adjust; leave dial empty", "dial", "policy")
        if self.router.reads == "bottleneck" and not policy.forecasts:
            raise Conflict(
                f"router.reads is bottleneck, but policy {self.policy} has no forecasters; choose another",
                "router.reads",
                "policy",
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        listed = ", ".join(self.stages)
        if sorted(self.stages, key=STAGE_NAMES.index) != self.stages:
            raise Conflict(f"stages are {listed}; they run in the order {', '.join(STAGE_NAMES)}", "stages")
        needed = required_stages(policy_named(self.policy))
        if self.stages and [name for name in self.stages if not stage_named(name).optional] != needed:
            raise Conflict(
                f"stages are {listed}, but policy {self.policy} needs {', '.join(needed)}; lora may follow them",
                "stages",
                "policy",
            )
        return self

    def validated(self) -> Self:
        """Return a copy whose fields have been checked against each other, those of the stages included.

        Raises:
            InputError: Names the fields, their values and what is allowed.
        """
        return build(type(self), [Layer("", self.to_dict())])

    def fit_ranks(self, width: int) -> None:
        """Set the forecaster ranks that are not given, for a hidden size.

        Raises:
            InputError: A rank is larger than the hidden size.
        """
        if not self.ffn_rank:
            self.ffn_rank = self.rank or default_ffn_rank(width)
        self.rank = self.rank or default_rank(width)
        for name, rank in (("rank", self.rank), ("ffn_rank", self.ffn_rank)):
            if rank > width:
                raise InputError(
                    f"{name} is {rank}, but the model's hidden size is {width}; give at most {width}", options=(name,)
                )

    @property
    def window(self) -> int:
        """Tokens per window of threshold, target and evaluation, once the base is known (see `fit_windows`)."""
        assert self.seq_len is not None
        return self.seq_len

    @property
    def train_window(self) -> int:
        """Tokens per window in training, once the base is known (see `fit_windows`)."""
        return self.train_seq_len or self.window

    def fit_windows(self, context: int | None) -> None:
        """Set the lengths of windows that are not given, for a model's context (None: unknown).

        Raises:
            InputError: A window is longer than the context.
        """
        given = self.train_seq_len or self.seq_len
        self.seq_len = self.seq_len_for(context)
        self.train_seq_len = given or min(TRAIN_SEQ_LEN, self.seq_len)
        _check_context("train_seq_len", self.train_seq_len, context)

    def seq_len_for(self, context: int | None) -> int:
        """Return the tokens per window for a model's context (None: unknown).

        Raises:
            InputError: The window is longer than the context.
        """
        seq_len = self.seq_len or min(SEQ_LEN, context or SEQ_LEN)
        _check_context("seq_len", seq_len, context)
        return seq_len

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for YAML or JSON; of sparsity and flops, only the one that is the target."""
        return self.model_dump(exclude={"flops" if self.flops is None else "sparsity"})


def _check_context(field: str, tokens: int, context: int | None) -> None:
    if context and tokens > context:
        raise InputError(
            f"{field} is {tokens}, but the model's context is {context}; give at most {context}", options=(field,)
        )


def default_rank(width: int) -> int:
    """Return the default forecaster rank for a hidden size: a tenth of it, but at most the paper's 100."""
    return max(1, min(100, width // 10))


def default_ffn_rank(width: int) -> int:
    """Return the default forecaster rank of FFN units for a hidden size: twice that of attention units."""
    return min(width, 2 * default_rank(width))


def check_key_policy(name: str, threshold: float) -> None:
    """Refuse a key/value policy that does not exist, or a threshold outside of 0 to 1.

    Raises:
        InputError: Names the field, its value and what is allowed.
    """
    build(Recipe, [Layer("", {"kv_policy": name, "kv_threshold": threshold})])


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its fields.

    Args:
        path: YAML file or name of a ready recipe; None for the defaults.
        overrides: Such as `router.steps=500`; values are YAML.

    Raises:
        InputError: The file cannot be read, a key is unknown, a value is not allowed, or values do not go together.
    """
    layers = [] if path is None else [recipe_layer(path)]
    return build(Recipe, [*layers, *(setting_layer(Recipe, text) for text in overrides)])


def recipe_layer(path: Path) -> Layer:
    """Return the values of a recipe: of a ready one by its name, or of a YAML file.

    Raises:
        InputError: It cannot be read.
    """
    return Layer(f"recipe {path}", read_recipe(path))


def recipe_from(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from plain data.

    Args:
        data: Nested keys and values.
        source: Where it was read; errors begin with it.

    Raises:
        InputError: A key is unknown, a value is not allowed, or values do not go together.
    """
    return build(Recipe, [Layer(source, data)])


def recipe_fields(recipe: Recipe | None = None) -> list[tuple[str, Any, str]]:
    """Return (name as `--set` takes it, value, help) of every field, in order.

    Args:
        recipe: Whose values; by default the defaults.
    """
    return _fields(recipe or Recipe(), "")


def _fields(part: Checked, prefix: str) -> list[tuple[str, Any, str]]:
    found: list[tuple[str, Any, str]] = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, Checked):
            found += _fields(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, copy.copy(value), field.description or ""))
    return found


def text_name(split: str) -> str:
    """Return how the text of the final evaluation is called."""
    return "held-out text" if split == "heldout" else f"{split} text"
