"""The plan of a comparison: which conversions are made, and the recipe of each."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from irc.errors import InputError
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe, override

DENSE = "dense"
_FIXED = frozenset(
    "model data policy sparsity seed stages eval_split eval_tokens seq_len device dtype precision".split()
)
_CHANGES = re.compile(r",(?=\s*[\w.]+\s*=)")  # the commas between settings, not those of a list


@dataclass(frozen=True)
class Cell:
    """One conversion of a comparison.

    Attributes:
        policy: Routing policy; `dense` is the dense model under a LoRA budget (policy static that drops nothing).
        sparsity: Target.
        seed: Of everything random.
        lora: Whether the stage lora follows.
        variant: Name of the option that is tried, empty for the plain method.
        changes: Settings of the recipe that differ, such as `router.steps=50`.
        swept: The setting whose sweep the cell belongs to; empty for none.
    """

    policy: str
    sparsity: float
    seed: int
    lora: bool = False
    variant: str = ""
    changes: tuple[str, ...] = ()
    swept: str = ""

    @property
    def name(self) -> str:
        """What the cell's folder is called."""
        parts = [self.policy, f"{self.sparsity:g}", "lora" if self.lora else "", self.variant, f"seed{self.seed}"]
        return re.sub(r"[^\w.=+-]", "_", "-".join(part for part in parts if part))

    def recipe(self, base: Recipe) -> Recipe:
        """Return the cell's recipe: the comparison's, with what this cell changes.

        Raises:
            InputError: A change names no field of the recipe, or its value does not fit.
        """
        recipe = copy.deepcopy(base)
        recipe.policy = "static" if self.policy == DENSE else self.policy
        recipe.sparsity, recipe.seed = self.sparsity, self.seed
        recipe.stages = [*policy_named(recipe.policy).stages, *(["lora"] if self.lora else [])]
        for change in self.changes:
            override(recipe, change)
        recipe.check()
        return recipe


@dataclass(frozen=True)
class Plan:
    """What a comparison covers.

    Attributes:
        policies: Routing policies.
        sparsities: Targets.
        seeds: Every cell is made once a seed.
        lora: Whether cells with the stage lora are made too, and the dense model under the same LoRA budget.
        budgets: Shares of the router stage's steps; what is trained is trained again with each.
        ranks: Forecaster ranks to sweep, at the first sparsity and seed.
        calibration_tokens: Tokens of the lff stage to sweep, at the first sparsity and seed.
        variants: Options by name, each a list of settings, at every sparsity and seed.
    """

    policies: Sequence[str]
    sparsities: Sequence[float]
    seeds: Sequence[int] = (0,)
    lora: bool = False
    budgets: Sequence[float] = ()
    ranks: Sequence[int] = ()
    calibration_tokens: Sequence[int] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a plan that compares nothing, or names a policy twice or one that is not there.

        Raises:
            InputError: Says what is wrong.
        """
        for policy in self.policies:
            policy_named(policy)
        for name, values in (("policies", self.policies), ("sparsities", self.sparsities), ("seeds", self.seeds)):
            if not values:
                raise InputError(f"--{name} is empty; give at least one")
            if len(set(values)) != len(values):
                raise InputError(f"--{name} names one twice: {', '.join(map(str, values))}")
        for name, changes in self.variants.items():
            fixed = next((key for change in changes if (key := change.partition("=")[0].strip()) in _FIXED), None)
            if fixed:
                raise InputError(f"--variant {name} changes {fixed}, in which cells must agree; set it for all")
        if any(not 0 < share < 1 for share in self.budgets):
            raise InputError("--budgets are shares of the router stage's steps; give some between 0 and 1")
        if (self.ranks or self.calibration_tokens or self.variants) and "informed" not in self.policies:
            raise InputError("--ranks, --calibration-tokens, --variant change policy informed; name it in --policies")

    def cells(self, base: Recipe) -> list[Cell]:
        """Return all cells, those of the plain policies first, each once.

        Args:
            base: The comparison's recipe.
        """
        self.check()
        grid = list(itertools.product(self.sparsities, self.seeds))
        first = grid[0]
        plain = [Cell(policy, *place) for place in grid for policy in self.policies]
        cells = [cell for cell in plain if not _repeats(cell, self.seeds)]
        for share in self.budgets:
            steps = max(1, round(share * base.router.steps))
            change = (f"router.steps={steps}",)
            trained = [policy for policy in self.policies if policy_named(policy).learns]
            cells += [
                Cell(policy, *place, False, change[0], change, "router.steps") for place in grid for policy in trained
            ]
        for name, values in (("rank", self.ranks), ("lff.tokens", self.calibration_tokens)):
            cells += [Cell("informed", *first, False, f"{name}={v}", (f"{name}={v}",), name) for v in values]
        for name, changes in self.variants.items():
            cells += [Cell("informed", *place, variant=name, changes=changes) for place in grid]
        if self.lora:
            cells += [Cell(DENSE, 0.0, seed, lora=True) for seed in self.seeds]
            cells += [Cell(policy, *place, lora=True) for place in grid for policy in self.policies]
        _check_names(cells)
        return list(dict.fromkeys(cells))


def _repeats(cell: Cell, seeds: Sequence[int]) -> bool:
    """Whether a cell has the result of another seed's: nothing random is in a policy that trains nothing."""
    return cell.policy == "static" and cell.seed != seeds[0]


def _check_names(cells: Iterable[Cell]) -> None:
    """Refuse two different cells of one name: one would take the other's folder."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if seen.setdefault(cell.name, cell) != cell:
            raise InputError(
                f"two cells would both be named {cell.name}; give variants names of their own, and targets that differ "
                "in six digits"
            )


def read_variants(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read options such as `frozen:router.forecaster_lr=0,router.steps=100`.

    Raises:
        InputError: One has no name or no setting, or two have the same name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, colon, settings = text.partition(":")
        name = name.strip()
        changes = tuple(part.strip() for part in _CHANGES.split(settings) if part.strip())
        if not (name and colon and changes and all("=" in change for change in changes)):
            raise InputError(f"--variant '{text}': expected NAME:KEY=VALUE[,KEY=VALUE], such as frozen:router.lr=1e-3")
        if name in found:
            raise InputError(f"--variant: two are named '{name}'; give each a name of its own")
        found[name] = changes
    return found


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data."""
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in vars(plan).items()}
