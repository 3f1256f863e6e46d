"""One record per stage: the recipe, the policies and the training code agree with it."""

from __future__ import annotations

import pytest

from irc.recipe.policies import POLICIES, PolicyName
from irc.recipe.recipe import Recipe
from irc.recipe.stages import STAGE_NAMES, STAGES, StageName, required_stages, stage_named
from irc.training.stages import STAGE_RUNNERS


def test_every_stage_has_its_settings_in_the_recipe_and_a_function_that_runs_it() -> None:
    recipe = Recipe()
    assert StageName.__args__ == STAGE_NAMES == tuple(STAGE_RUNNERS)  # type: ignore[attr-defined]
    for stage in STAGES:
        assert type(stage.settings_in(recipe)) is stage.settings
        assert set(stage.depends_on) <= set(Recipe.model_fields)
        assert stage_named(stage.name) is stage


def test_a_stage_follows_one_before_it() -> None:
    for index, stage in enumerate(STAGES):
        assert stage.follows is None or stage.follows in STAGE_NAMES[:index]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_a_recipe_takes_the_stages_that_its_policy_requires(policy: object) -> None:
    assert isinstance(policy, type(POLICIES["informed"]))
    needed = required_stages(policy)
    assert needed == (["lff", "router"] if policy.forecasts else ["router"])
    Recipe(policy=policy.name, stages=needed)
    Recipe(policy=policy.name, stages=[*needed, "lora"])


def test_the_policies_are_those_that_a_recipe_takes() -> None:
    assert PolicyName.__args__ == tuple(POLICIES)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        ("informed", {"lff", "router", "lora"}),
        ("random", {"lff", "router", "lora"}),
        ("static", {"lff", "lora"}),
        ("skipgpt", {"lff", "router", "lora"}),
    ],
)
def test_which_stages_read_batches(policy: str, trained: set[str]) -> None:
    recipe = Recipe()
    recipe.lff.steps = 1
    found = {stage.name for stage in STAGES if stage.settings_in(recipe).trains(POLICIES[policy])}
    assert found == trained
    recipe.lff.steps, recipe.router.forecaster_lr = 0, 0.0
    assert not recipe.lff.trains(POLICIES[policy])
    assert recipe.router.trains(POLICIES[policy]) == POLICIES[policy].learns
