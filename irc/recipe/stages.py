"""The recipe's parts: what each stage does, field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from irc.errors import InputError

READS = ("", "unit", "stream", "layer", "bottleneck")
BUDGETS = ("model", "flops", "unit", "recoverability")


def setting(default: Any, text: str) -> Any:
    """Declare a recipe field with its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class LffRecipe:
    """Stage `lff`: fit the forecasters."""

    tokens: int = setting(65_536, "calibration tokens of the streaming pass, from the train split")
    ridge: float = setting(1e-4, "ridge of the regression, relative to the mean input variance")
    steps: int = setting(50, "refinement steps by L1 + (1 - cosine); 0 leaves the closed form")
    batch_size: int = setting(8, "windows a refinement step")
    lr: float = setting(1e-3, "refinement learning rate, cosine to zero")


@dataclass
class RouterRecipe:
    """Stage `router`: train the routers, then set their decision threshold."""

    reads: str = setting("", "what routers read: unit (its normed input), stream, layer; empty for the policy's own")
    start: float = setting(0.0, "logit for execution that untrained routers start with: 3 begins nearly dense")
    steps: int = setting(200, "training steps")
    batch_size: int = setting(8, "windows a step")
    lr: float = setting(5e-3, "learning rate of the routers, cosine to a tenth")
    forecaster_lr: float = setting(2e-3, "learning rate of the forecasters in this stage; 0 freezes them")
    temperature_start: float = setting(5.0, "Gumbel-softmax temperature at the first step")
    temperature_end: float = setting(1.0, "temperature at the last step, linear in between")
    sparsity_weight: float = setting(8.0, "weight of |(1 - sparsity) - mean execution|")
    cosine_weight: float = setting(0.1, "weight of mean(1 - cosine) over approximated tokens")
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no bound")
    noise_end: float = setting(1.0, "scale of the sampling noise at the last step, falling over the second half")
    entropy_weight: float = setting(0.0, "weight of the mean entropy of the routers' decisions")
    budget: str = setting("model", "what meets the target: model, flops (of the model), unit (each), recoverability")
    target_range: list[float] = field(
        default_factory=list,
        metadata={"help": "lowest and highest target, of which every step draws one; none trains for sparsity alone"},
    )
    teach_steps: int = setting(-1, "steps that first teach routers what skipping costs; -1: 30, informed up to 0.5")
    distill: float = setting(0.0, "share of the loss that is the divergence from the dense model's logits, 0 to 1")
    calibration_tokens: int = setting(49_152, "tokens that set the threshold, from the calibration split")

    def check(self, forecasts: bool) -> None:
        """Refuse values that cannot work together.

        Args:
            forecasts: Whether the policy has forecasters.

        Raises:
            InputError: Names the field, its value and what it may be.
        """
        if self.reads not in READS:
            raise InputError(f"router.reads is '{self.reads}'; choose from {', '.join(READS[1:])}")
        if self.reads == "bottleneck" and not forecasts:
            raise InputError("router.reads is 'bottleneck', but this policy has no forecasters; leave it out")
        if self.budget not in BUDGETS:
            raise InputError(f"router.budget is '{self.budget}'; choose from {', '.join(BUDGETS)}")
        ends = self.target_range
        numbers = all(type(end) in (int, float) for end in ends)
        if ends and not (numbers and len(ends) == 2 and 0 <= ends[0] < ends[1] <= 1):
            raise InputError(f"router.target_range is {ends}; give two shares in ascending order, such as [0.1, 0.6]")
        if ends and self.budget in ("unit", "recoverability"):
            raise InputError(f"router.target_range needs a budget of the whole model, not '{self.budget}'")


@dataclass
class LoraRecipe:
    """Stage `lora` (optional): low-rank adapters on the base's linears, routing on."""

    steps: int = setting(200, "training steps")
    batch_size: int = setting(8, "windows a step")
    lr: float = setting(2e-4, "learning rate, cosine to zero")
    forecaster_lr: float = setting(0.0, "learning rate of the forecasters in this stage; 0 freezes them")
    router_lr: float = setting(0.0, "learning rate of the routers, under sampled routes; 0 freezes them")
    rank: int = setting(16, "rank of the adapters")
    alpha: int = setting(32, "scale of the adapters: alpha / rank")
    dropout: float = setting(0.1, "dropout before the adapters")
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "gate_proj"], metadata={"help": "names of the adapted linears"}
    )
