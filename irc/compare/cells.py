"""The plan of a comparison: which conversions it makes, and the recipe of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from irc.errors import InputError
from irc.recipe.layers import Layer, build, setting_layer
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe
from irc.recipe.stages import required_stages
from irc.recipe.target import Target, value_of

DENSE = "dense"
_FIXED = frozenset(
    "model data policy sparsity flops seed stages eval_split eval_tokens seq_len device dtype precision".split()
)
_BETWEEN_SETTINGS = re.compile(r",(?=\s*[\w.]+\s*=)")  # a comma inside a list does not match


@dataclass(frozen=True)
class Cell:
    """One conversion of a comparison.

    Attributes:
        policy: Routing policy; `dense` is the dense model with LoRA alone (policy static with nothing dropped).
        sparsity: Target sparsity; None if the target is in FLOPs.
        seed: Seed of all random numbers.
        lora: Whether the stage lora follows.
        variant: Name of the variant, empty for the plain method.
        changes: Recipe settings that differ from the comparison's, such as `router.steps=50`.
        swept: The setting whose sweep the cell belongs to, or empty.
        flops: Target FLOPs ratio, routed over dense; None if the target is a sparsity.
    """

    policy: str
    sparsity: float | None
    seed: int
    lora: bool = False
    variant: str = ""
    changes: tuple[str, ...] = ()
    swept: str = ""
    flops: float | None = None

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        target = f"{self.sparsity:g}" if self.flops is None else f"flops{self.flops:g}"
        parts = [self.policy, target, "lora" if self.lora else "", self.variant, f"seed{self.seed}"]
        return re.sub(r"[^\w.=+-]", "_", "-".join(part for part in parts if part))

    def recipe(self, base: Recipe) -> Recipe:
        """Return the comparison's recipe with the changes of this cell.

        Raises:
            InputError: A change names a field that does not exist, or its value is not allowed.
        """
        policy = "static" if self.policy == DENSE else self.policy
        stages = [*required_stages(policy_named(policy)), *(["lora"] if self.lora else [])]
        target = {"sparsity": self.sparsity} if self.flops is None else {"flops": self.flops}
        own = {"policy": policy, **target, "seed": self.seed, "stages": stages}
        source = f"cell {self.name}"
        changes = (setting_layer(Recipe, change, source) for change in self.changes)
        return build(Recipe, [Layer("", base.to_dict()), Layer(source, own), *changes])


@dataclass(frozen=True)
class Plan:
    """What a comparison covers.

    Attributes:
        policies: Routing policies.
        sparsities: Target sparsities.
        seeds: Every cell is made once per seed.
        lora: Whether to repeat every cell with the stage lora, and to train the dense model with the same LoRA budget.
        budgets: Fractions of the router stage's steps; policies that learn are trained again with each.
        ranks: Forecaster ranks to sweep, at the first sparsity and seed.
        calibration_tokens: Tokens of the lff stage to sweep, at the first sparsity and seed.
        variants: Variants of informed by name, each a list of settings, at every target and seed.
        flops: Target FLOPs ratios, after the sparsities.
    """

    policies: Sequence[str]
    sparsities: Sequence[float]
    seeds: Sequence[int] = (0,)
    lora: bool = False
    budgets: Sequence[float] = ()
    ranks: Sequence[int] = ()
    calibration_tokens: Sequence[int] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flops: Sequence[float] = ()

    @property
    def targets(self) -> list[Target]:
        """All targets, in order."""
        return [Target("sparsity", s) for s in self.sparsities] + [Target("flops", f) for f in self.flops]

    def check(self) -> None:
        """Refuse a plan that compares nothing, names something twice, or names an unknown policy.

        Raises:
            InputError: Names the list and the value.
        """
        for policy in self.policies:
            policy_named(policy)
        lists = {"policies": self.policies, "sparsities": self.sparsities, "flops": self.flops, "seeds": self.seeds}
        for name, values in lists.items():
            if not values and (name not in ("sparsities", "flops") or not self.targets):
                raise InputError(f"the list of {name} is empty; give at least one", options=(name,))
            if len(set(values)) != len(values):
                listed = ", ".join(map(str, values))
                raise InputError(f"{name} are {listed}; name each only once", options=(name,))
        for name, changes in self.variants.items():
            keys = [change.partition("=")[0].strip() for change in changes]
            if fixed := [key for key in keys if key in _FIXED]:
                raise InputError(
                    f"variant {name} changes {fixed[0]}, which must be the same in all cells; set it in the recipe",
                    options=("variants", "overrides"),
                )
        if wrong := [share for share in self.budgets if not 0 < share < 1]:
            raise InputError(
                f"budgets hold {wrong[0]:g}; give fractions of the router stage's steps, between 0 and 1",
                options=("budgets",),
            )
        sweeps = {"ranks": self.ranks, "calibration_tokens": self.calibration_tokens, "variants": self.variants}
        if (given := [name for name, values in sweeps.items() if values]) and "informed" not in self.policies:
            raise InputError(
                f"{given[0]} apply to policy informed, which is not compared; add it to the policies",
                options=(given[0], "policies"),
            )

    def cells(self, base: Recipe) -> list[Cell]:
        """Return all cells without repetition, those of the plain policies first.

        Args:
            base: The comparison's recipe.
        """
        self.check()
        grid = list(itertools.product(self.targets, self.seeds))
        plain = [_cell(policy, *place) for place in grid for policy in self.policies]
        cells = [cell for cell in plain if not _repeats(cell, self.seeds)]
        for share in self.budgets:
            steps = max(1, round(share * base.router.steps))
            change = (f"router.steps={steps}",)
            trained = [policy for policy in self.policies if policy_named(policy).learns]
            cells += [
                _cell(policy, *place, variant=change[0], changes=change, swept="router.steps")
                for place in grid
                for policy in trained
            ]
        swept: list[tuple[str, tuple[str, ...]]] = [
            ("rank", (f"rank={rank}", f"ffn_rank={rank}")) for rank in self.ranks
        ]
        swept += [("lff.tokens", (f"lff.tokens={tokens}",)) for tokens in self.calibration_tokens]
        cells += [_cell("informed", *grid[0], variant=one[0], changes=one, swept=name) for name, one in swept]
        for name, changes in self.variants.items():
            cells += [_cell("informed", *place, variant=name, changes=changes) for place in grid]
        if self.lora:
            cells += [Cell(DENSE, 0.0, seed, lora=True) for seed in self.seeds]
            cells += [_cell(policy, *place, lora=True) for place in grid for policy in self.policies]
        _check_names(cells)
        return list(dict.fromkeys(cells))


def _cell(policy: str, target: Target, seed: int, **others: Any) -> Cell:
    return Cell(policy, value_of(target, "sparsity"), seed, flops=value_of(target, "flops"), **others)


def _repeats(cell: Cell, seeds: Sequence[int]) -> bool:
    """Whether a cell has the result of an earlier one: policy static is the same for every seed."""
    return cell.policy == "static" and cell.seed != seeds[0]


def _check_names(cells: Iterable[Cell]) -> None:
    """Refuse two different cells of the same name: they would share a folder."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if seen.setdefault(cell.name, cell) != cell:
            raise InputError(
                f"two cells would both be named {cell.name}; give each variant its own name, and "
                "targets that differ in their first six digits",
                options=("variants", "sparsities", "flops"),
            )


def read_variants(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read variants such as `frozen:router.forecaster_lr=0,router.steps=100`.

    Raises:
        InputError: A variant has no name or no setting, or two have the same name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, colon, settings = text.partition(":")
        name = name.strip()
        changes = tuple(part.strip() for part in _BETWEEN_SETTINGS.split(settings) if part.strip())
        if not (name and colon and changes and all("=" in change for change in changes)):
            raise InputError(
                f"variant '{text}': expected NAME:KEY=VALUE[,KEY=VALUE], such as frozen:router.lr=1e-3",
                options=("variants",),
            )
        if name in found:
            raise InputError(f"two variants are named '{name}'; give each its own name", options=("variants",))
        found[name] = changes
    return found


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data."""
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in vars(plan).items()}
