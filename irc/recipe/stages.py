"""The stages of a conversion: what each is called, what it sets, and which policies need it.

Every other place that lists stages reads `STAGES`. `irc.training.stages` maps their names to the functions that run
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field

from irc.recipe.checked import Checked, Count, Natural, Real, Share
from irc.recipe.policies import Policy
from irc.recipe.refusals import LARGEST_INTEGER

StageName = Literal["lff", "router", "lora"]
Weight = Annotated[Real, Field(ge=0)]


class LffRecipe(Checked):
    """Settings of stage `lff`, which fits the forecasters."""

    tokens: Count = Field(
        default=65_536, description="calibration tokens for the closed-form fit, from the train split"
    )
    ridge: Weight = Field(default=1e-4, description="ridge of the regression, relative to the mean input variance")
    steps: Natural = Field(default=0, description="refinement steps on L1 + (1 - cosine); 0 keeps the closed form")
    batch_size: Count | None = Field(
        default=None, description="windows per step of refinement; null: as many as make 2,048 tokens"
    )
    lr: Weight = Field(default=1e-3, description="learning rate of the refinement, cosine decay to zero")

    step_tokens: ClassVar[int] = 2048

    def trains(self, policy: Policy) -> bool:
        """Whether the stage reads batches of text under a policy."""
        return self.steps > 0


TAUGHT_HIDDEN = 2
"""Hidden units of a router that stays as it was taught: relu(z) - relu(-z) is the linear function z."""


class RouterRecipe(Checked):
    """Settings of stage `router`: teaches routers, trains forecasters under them, sets the decision threshold."""

    reads: Literal["", "unit", "stream", "layer", "bottleneck"] = Field(
        default="",
        description="what routers read: unit (its normed input), stream, layer, bottleneck; empty: set by policy",
    )
    hidden: Natural | None = Field(
        default=None,
        description="hidden units of a router; 0: as many as its policy's authors have; null: 2 if it stays as taught",
    )
    start: Real = Field(
        default=0.0, description="initial logit for executing; at 3, training begins with nearly all executed"
    )
    steps: Natural = Field(default=120, description="training steps; 0 leaves the forecasters as they were fitted")
    batch_size: Count | None = Field(default=None, description="windows per step; null: as many as make 1,024 tokens")
    lr: Weight | None = Field(
        default=None,
        description="learning rate of the routers, cosine decay to a tenth; null: 0 after teaching, otherwise 5e-3",
    )
    forecaster_lr: Weight = Field(
        default=5e-4, description="learning rate of the forecasters in this stage; 0 freezes them"
    )
    noise: Weight | None = Field(
        default=None,
        description="scale of the sampling noise, where routers learn; null: 0 after teaching, otherwise 1",
    )
    temperature_start: Annotated[Real, Field(ge=0.001)] | None = Field(
        default=None, description="temperature of the gate at the first step; null: 1 after teaching, otherwise 5"
    )
    temperature_end: Real = Field(default=1.0, ge=0.001, description="temperature at the last step, reached linearly")
    sparsity_weight: Weight | None = Field(
        default=None,
        description="factor of the price of executing (KL per skipped share), null: 1; "
        "with noise, weight of the distance from the target, null: 8",
    )
    cosine_weight: Weight = Field(default=0.1, description="weight of mean(1 - cosine) over approximated tokens")
    teach_steps: int = Field(
        default=-1,
        ge=-1,
        le=LARGEST_INTEGER,
        description="batches (16,384 tokens at most) that teach routers the cost of skipping; -1: 16 for "
        "informed up to sparsity 0.5 or from flops 0.6",
    )
    distill: Share = Field(
        default=1.0,
        description="share of KL(dense || routed) in the loss; the rest is the language-model loss of the text",
    )
    calibration_tokens: Count = Field(
        default=24_576, description="tokens that set the threshold, from the calibration split"
    )

    step_tokens: ClassVar[int] = 1024
    most_taught: ClassVar[int] = 16_384
    """Tokens that teaching reads at most, because it keeps what all routers read."""

    def windows_taught(self, window: int) -> int:
        """Return how many windows of `window` tokens teach the routers, if there is as much text."""
        return min(max(0, self.teach_steps) * batch_of(self), max(1, self.most_taught // window))

    def trains(self, policy: Policy) -> bool:
        """Whether the stage reads batches of text under a policy."""
        routers, forecasters = policy.learns and self.lr != 0, policy.forecasts and self.forecaster_lr > 0
        return self.steps > 0 and (routers or forecasters)

    def settled(self) -> Self:
        """Return a copy in which what depends on teaching is a number. Routes are sampled only where routers learn."""
        taught = self.teach_steps > 0
        noise = (0.0 if taught else 1.0) if self.noise is None else self.noise
        usual = 5e-3 if not taught else 3e-4 if noise > 0 else 0.0
        lr = usual if self.lr is None else self.lr
        noise = noise if lr > 0 else 0.0
        found = {
            "lr": lr,
            "noise": noise,
            "hidden": (TAUGHT_HIDDEN if taught and not lr else 0) if self.hidden is None else self.hidden,
            "sparsity_weight": (8.0 if noise > 0 else 1.0) if self.sparsity_weight is None else self.sparsity_weight,
            "temperature_start": self.temperature_start or (1.0 if taught else 5.0),
        }
        return self.model_copy(update=found)


class LoraRecipe(Checked):
    """Settings of stage `lora`, which trains low-rank adapters on the base's linears while tokens are routed."""

    steps: Count = Field(default=200, description="training steps")
    batch_size: Count | None = Field(default=None, description="windows per step; null: as many as make 2,048 tokens")
    lr: Weight = Field(default=2e-4, description="learning rate of the adapters, cosine decay to zero")
    forecaster_lr: Weight = Field(
        default=0.0, description="learning rate of the forecasters in this stage; 0 freezes them"
    )
    router_lr: Weight = Field(default=0.0, description="learning rate of the routers in this stage; 0 freezes them")
    rank: Count = Field(default=16, description="rank of the adapters")
    alpha: Count = Field(default=32, description="scale of the adapters: alpha / rank")
    dropout: Real = Field(default=0.1, ge=0, lt=1, description="dropout in front of the adapters")
    targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "v_proj", "gate_proj"],
        min_length=1,
        description="names of the linears that get adapters",
    )

    step_tokens: ClassVar[int] = 2048

    def trains(self, policy: Policy) -> bool:
        """Whether the stage reads batches of text under a policy."""
        return True


StageSettings = LffRecipe | RouterRecipe | LoraRecipe


def batch_of(settings: StageSettings) -> int:
    """Return the windows per step of a stage, once the length of a window is known."""
    assert settings.batch_size is not None
    return settings.batch_size


class HoldsSettings(Protocol):
    """What holds the settings of every stage, by the stage's name: a recipe."""

    lff: LffRecipe
    router: RouterRecipe
    lora: LoraRecipe

    @property
    def train_window(self) -> int:
        """Tokens per window in training."""


@dataclass(frozen=True)
class Stage:
    """One stage of a conversion.

    Attributes:
        name: As `--stages` takes it; also the recipe's field that holds its settings.
        settings: The class of its settings.
        help: What the stage does, one line.
        follows: The stage before it, if the policy has that one.
        optional: Whether a conversion may leave it out.
        needs_forecasters: Whether only policies with forecasters have it.
        through_layers: Whether it propagates gradients through the decoder layers, which keep their inputs for that.
        depends_on: The recipe's fields that decide its result, besides base and text; empty if results are not shared
            between conversions.
    """

    name: StageName
    settings: type[StageSettings]
    help: str
    follows: StageName | None = None
    optional: bool = False
    needs_forecasters: bool = False
    through_layers: bool = True
    depends_on: tuple[str, ...] = ()

    def settings_in(self, recipe: HoldsSettings) -> StageSettings:
        """Return the stage's settings in a recipe."""
        found: StageSettings = getattr(recipe, self.name)
        return found


_COMMON = ("policy", "rank", "ffn_rank", "forecaster", "train_seq_len", "seed", "device", "dtype", "precision", "lff")
STAGES = (
    Stage("lff", LffRecipe, "fit the forecasters", needs_forecasters=True, through_layers=False, depends_on=_COMMON),
    Stage(
        "router",
        RouterRecipe,
        "teach the routers, train the forecasters under them, then set the decision threshold",
        follows="lff",
        depends_on=(*_COMMON, "seq_len", "sparsity", "flops", "router"),
    ),
    Stage("lora", LoraRecipe, "train LoRA adapters on the base's linears", follows="router", optional=True),
)
"""All stages, in the order in which they run."""

STAGE_NAMES: tuple[StageName, ...] = tuple(stage.name for stage in STAGES)


_LEAST_TOKENS_READ = 2**20


def tokens_to_read(recipe: HoldsSettings) -> int:
    """Return how much of the train split a conversion tokenizes: as much as its stages read, as a power of two.

    A step draws its windows from all of that. Recipes that differ in a few steps still read the same text, so that they
    share finished stages.
    """
    lff, router, lora = recipe.lff, recipe.router, recipe.lora
    routed = router.steps * batch_of(router) + router.windows_taught(recipe.train_window)
    windows = lff.steps * batch_of(lff) + routed + lora.steps * batch_of(lora)
    needed = max(_LEAST_TOKENS_READ, lff.tokens + windows * recipe.train_window)
    return int(2 ** math.ceil(math.log2(needed)))


def stage_named(name: str) -> Stage:
    """Return a stage.

    Raises:
        KeyError: There is no stage of that name.
    """
    return {str(stage.name): stage for stage in STAGES}[name]


def required_stages(policy: Policy) -> list[StageName]:
    """Return the stages that a policy cannot do without, in order."""
    return [stage.name for stage in STAGES if not stage.optional and (policy.forecasts or not stage.needs_forecasters)]
