"""The modules that passes insert: router, forecaster and mux, and the control that all muxes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from passes.inserted import APPROXIMATE as APPROXIMATE  # our trainer and tests import both from here
from passes.inserted import EXECUTE as EXECUTE
from passes.inserted import ForecasterForm, RouterForm, ZeroForm

Mode = Literal["route", "sample", "execute", "approximate", "forced"]


def router_hidden(width: int, rank: int) -> int:
    """Return the hidden size of a router: d//4 - 2r, at least 8 (arXiv 2510.13831: d//4 - 200 at r = 100)."""
    return max(8, width // 4 - 2 * rank)


class Router(nn.Sequential):
    """Two-layer decision maker: x [batch, tokens, d] -> logits [batch, tokens, 2] (execute, approximate)."""

    form = RouterForm("0", "2")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first linear reads, [batch, tokens, width of the router]."""
        return x

    @property
    def first(self) -> nn.Linear:
        """The linear that reads the features."""
        first = self[0]
        assert isinstance(first, nn.Linear)
        return first

    @property
    def last(self) -> nn.Linear:
        """The linear that computes the two logits."""
        last = self[2]
        assert isinstance(last, nn.Linear)
        return last

    def shift(self, amount: float) -> None:
        """Add `amount` to the execute logit of every token."""
        with torch.no_grad():
            self.last.bias[EXECUTE] += amount


class Forecaster(nn.Module):
    """Low-rank approximation of a unit: d -> r -> d, linear or with a SiLU at the bottleneck.

    Args:
        width: Hidden size d.
        rank: Bottleneck r.
        activation: `linear` (the paper) or `silu` (the authors' code).
    """

    def __init__(self, width: int, rank: int, activation: str = "linear") -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.act: nn.Module = nn.SiLU() if activation == "silu" else nn.Identity()
        self.up = nn.Linear(rank, width)

    @property
    def form(self) -> ForecasterForm:
        """What lowering knows of the forecaster."""
        return ForecasterForm("down", "act", "up", is_linear=isinstance(self.act, nn.Identity))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Approximate unit(x); x and the result are [batch, tokens, d]."""
        result: torch.Tensor = self.up(self.act(self.down(x)))
        return result


class BottleneckRouter(Router):
    """A router that reads the bottleneck of its unit's forecaster; x and logits as of `Router`."""

    form = RouterForm("0", "2", of_bottleneck=True)

    def __init__(self, forecaster: Forecaster, hidden: int) -> None:
        super().__init__(forecaster.down.out_features, hidden)
        # In a tuple, which makes them no submodules, so that no parameter has two names.
        self._shared = (forecaster.down, forecaster.act)

    @property
    def bottleneck(self) -> nn.Linear:
        """The forecaster's first linear."""
        return self._shared[0]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the forecaster's bottleneck."""
        down, act = self._shared
        bottleneck: torch.Tensor = act(down(x))
        return bottleneck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = super().forward(self.features(x))  # type: ignore[no-untyped-call]
        return logits


class ZeroForecaster(nn.Module):
    """The forecaster of greedy policies: a skipped unit adds nothing to the residual stream."""

    form = ZeroForm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros of x's shape."""
        return torch.zeros_like(x)


@dataclass
class Record:
    """What one mux recorded in one forward call; every tensor is [batch, tokens].

    Attributes:
        execute: 1 where the unit was executed, 0 where approximated.
        soft: Probability of executing, which carries the router's gradient (sampling only).
        difference: Execute logit minus approximate logit (only with a router).
        l1: Mean absolute error of the forecast over d (only if measured).
        cosine: Cosine between forecast and unit output (only if measured).
    """

    execute: torch.Tensor
    soft: torch.Tensor | None = None
    difference: torch.Tensor | None = None
    l1: torch.Tensor | None = None
    cosine: torch.Tensor | None = None


@dataclass
class RoutingControl:
    """How the muxes of a model decide; all of them share one control.

    Attributes:
        mode: `route` follows the routers' argmax (inference), `sample` draws hard Gumbel-softmax
            decisions (training), `execute` and `approximate` ignore the routers, `forced` follows `masks`.
        temperature: Temperature of the sampling.
        shift: Added to every logit difference in sampling.
        noise_scale: Scale of the sampling noise; 0 turns it off.
        noise: Uniform draws per unit, [batch, tokens], for the sampling. The caller draws them, which makes them
            reproducible.
        masks: Per unit, bool [batch, tokens], True where the unit executes.
        tape: Receives a `Record` per unit and call, unless it is None.
        measure_error: Whether records contain the forecast's error.
        reduced: Attention units whose skipped tokens store no keys and values (inference only).
        capacity: Share of each sequence's tokens that execute, by rank of the logit difference (Mixture-of-Depths);
            None if every token is decided on its own.
        real: bool [batch, tokens], False on padding, for ranking; None without padding.
    """

    mode: Mode = "route"
    temperature: float = 1.0
    shift: float = 0.0
    noise_scale: float = 1.0
    noise: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    tape: dict[str, Record] | None = None
    measure_error: bool = False
    reduced: frozenset[str] = frozenset()
    capacity: float | None = None
    real: torch.Tensor | None = None

    def decide(self, unit: str, difference: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Return which tokens of a unit execute in every mode except `sample`, bool [batch, tokens].

        Tokens whose difference is NaN execute.

        Args:
            unit: Name of the unit.
            difference: Its router's execute logit minus the approximate one [batch, tokens]; without it every token
                executes in mode `route`.
            like: Any tensor [batch, tokens, ...] on the right device.
        """
        if self.mode == "route" and difference is not None:
            return ~(difference < 0) if self.capacity is None else self.top(difference, self.capacity)
        if self.mode == "forced":
            return self.masks[unit]
        return torch.full(like.shape[:2], self.mode != "approximate", device=like.device)

    def sample(self, unit: str, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decisions of a unit in mode `sample`, bool, and their soft gates; all [batch, tokens]."""
        if self.capacity is not None:
            return self.top(difference, self.capacity), torch.sigmoid(difference)
        uniform = self.noise[unit].to(difference)
        noise = self.noise_scale * torch.logit(uniform, eps=1e-6)
        soft = torch.sigmoid((difference + self.shift + noise) / self.temperature)
        return ~(soft < 0.5), soft

    def top(self, difference: torch.Tensor, capacity: float) -> torch.Tensor:
        """Select the best-ranked share of each sequence's real tokens; of equal tokens the earlier ranks first."""
        real = torch.ones_like(difference, dtype=torch.bool) if self.real is None else self.real
        count = (capacity * real.sum(-1, keepdim=True)).round()
        order = difference.detach().masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        chosen: torch.Tensor = order.argsort(dim=-1) < count
        return chosen

    @contextmanager
    def using(self, **changes: Any) -> Iterator[RoutingControl]:
        """Set attributes within a `with` block."""
        before = {key: getattr(self, key) for key in changes}
        for key, value in changes.items():
            setattr(self, key, value)
        try:
            yield self
        finally:
            for key, value in before.items():
                setattr(self, key, value)


class Mux(nn.Module):
    """Chooses per token between a unit's output and its forecast.

    Args:
        unit: Name of the unit, the key of its records, masks and noise.
        control: Shared by all muxes of the model.
    """

    def __init__(self, unit: str, control: RoutingControl) -> None:
        super().__init__()
        self.unit = unit
        self.control = control

    def forward(self, y: torch.Tensor, forecast: torch.Tensor, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Return y where the token executes, else forecast.

        Args:
            y: Unit output [batch, tokens, d].
            forecast: Forecaster output [batch, tokens, d].
            logits: Router output [batch, tokens, 2]; without it every token executes in mode `route`.
        """
        control = self.control
        difference = None if logits is None else difference_of(logits)
        soft = None
        if control.mode == "sample" and difference is not None:
            execute, soft = control.sample(self.unit, difference)
        else:
            execute = control.decide(self.unit, difference, y)
        if control.tape is not None:
            error = forecast_error(forecast, y) if control.measure_error else (None, None)
            control.tape[self.unit] = Record(execute, soft, difference, *error)
        if control.mode == "execute":
            return y
        if soft is None:
            return torch.where(execute.unsqueeze(-1), y, forecast.to(y.dtype))
        apply: Callable[..., torch.Tensor] = StraightThroughMux.apply
        return apply(y, forecast.to(y.dtype), execute, soft)


class StoredKeys(nn.Module):
    """Finds the tokens of an attention unit that have keys in its cache: in a reduced unit, those that executed.

    Args:
        unit: Name of the unit.
        control: Shared by all muxes of the model.
    """

    def __init__(self, unit: str, control: RoutingControl) -> None:
        super().__init__()
        self.unit = unit
        self.control = control

    def forward(
        self, mask: torch.Tensor, past_k: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unit's mask without tokens that have no key, and which tokens have one.

        Args:
            mask: bool [batch, 1, tokens, past + tokens], true where attended.
            past_k: Keys of earlier tokens [batch, heads, past, size]; a key of zeros was not stored.
            logits: Of the unit's router, [batch, tokens, 2].

        Returns:
            The mask, and bool [batch, past + tokens].
        """
        control = self.control
        if self.unit not in control.reduced or control.mode in ("execute", "sample"):
            stored = logits.new_ones(logits.shape[0], past_k.shape[2] + logits.shape[1], dtype=torch.bool)
        else:
            before = (past_k != 0).any(dim=-1).any(dim=1)
            stored = torch.cat((before, control.decide(self.unit, difference_of(logits), logits)), dim=1)
        return mask & stored[:, None, None, :], stored


def difference_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the execute logit minus the approximate one in float32, [batch, tokens]."""
    return logits[..., EXECUTE].float() - logits[..., APPROXIMATE].float()


class StraightThroughMux(torch.autograd.Function):
    """Chooses hard in the forward pass; backward is that of soft * y + (1 - soft) * forecast at soft = hard.

    Forward values are exact copies of y or forecast, not rounded by a multiplication with a gate.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, forecast: torch.Tensor, execute: torch.Tensor, soft: torch.Tensor
    ) -> torch.Tensor:
        """Return y where execute, else forecast."""
        ctx.save_for_backward(y, forecast, execute)
        return torch.where(execute.unsqueeze(-1), y, forecast)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Route the gradient to the chosen branch, and (grad . (y - forecast)) to the soft gate."""
        (grad,) = grads
        y, forecast, execute = ctx.saved_tensors
        mask = execute.unsqueeze(-1)
        zero = grad.new_zeros(())
        to_y = torch.where(mask, grad, zero) if ctx.needs_input_grad[0] else None
        to_forecast = torch.where(mask, zero, grad) if ctx.needs_input_grad[1] else None
        to_soft = (grad * (y - forecast)).sum(-1).float() if ctx.needs_input_grad[3] else None
        return to_y, to_forecast, None, to_soft


def forecast_error(forecast: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per-token L1 error (mean over d) and cosine similarity, each float32 [batch, tokens]."""
    forecast, y = forecast.float(), y.float()
    return (forecast - y).abs().mean(-1), F.cosine_similarity(forecast, y, dim=-1)
