"""`--flops` beside `--sparsity`: which is the target, what cannot be reached, and all policies at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.cli.recipe_options import recipe_of
from irc.errors import InputError
from irc.recipe.policies import POLICIES
from irc.recipe.recipe import Recipe, load_recipe, recipe_from
from irc.recipe.target import Target

Arguments = Callable[..., list[str]]
DEFAULT = {"flops": 0.85}


def test_the_command_line_has_its_own_default(tmp_path: Path) -> None:
    assert recipe_of(None, [], {}, DEFAULT).target == Target("flops", 0.85)
    assert recipe_of(None, ["sparsity=0.4"], {}, DEFAULT).target == Target("sparsity", 0.4)
    assert recipe_of(None, [], {"sparsity": 0.4}, DEFAULT).target == Target("sparsity", 0.4)
    assert recipe_of(Path("llama-3.2-1b-40"), [], {}, DEFAULT).target == Target("sparsity", 0.4)
    assert recipe_of(Path("llama-3.2-1b-40"), [], {"flops": 0.7}, DEFAULT).target == Target("flops", 0.7)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert recipe_of(tmp_path / "mine.yaml", [], {}, DEFAULT).target == Target("sparsity", 0.25)
    assert Recipe().target == Target("sparsity", 0.25)


def test_what_is_given_last_is_the_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flops: 0.8\n")
    assert load_recipe(path).target == Target("flops", 0.8)
    assert load_recipe(path, ["sparsity=0.3"]).target == Target("sparsity", 0.3)
    assert recipe_of(path, ["sparsity=0.3"], {"flops": 0.9}).target == Target("flops", 0.9)
    path.write_text("flops: null\nsparsity: 0.3\n")
    assert load_recipe(path).target == Target("sparsity", 0.3)
    path.write_text("sparsity: 0.3\nflops: 0.8\n")
    for make in (
        lambda: load_recipe(path),
        lambda: load_recipe(path, ["seed=1"]),
        lambda: load_recipe(None, ["sparsity=0.3", "flops=0.8"]),
        lambda: recipe_of(None, [], {"sparsity": 0.3, "flops": 0.8}),
        lambda: Recipe(sparsity=0.3, flops=0.8),
    ):
        with pytest.raises(InputError, match=r"sparsity is 0\.3 and flops is 0\.8"):
            make()


def test_a_recipe_in_flops_is_written_and_read_again() -> None:
    recipe = Recipe(flops=0.8)
    for other in (recipe.validated(), recipe_from(recipe.to_dict())):
        assert other == recipe
    assert "sparsity" not in recipe.to_dict()
    assert "flops" not in Recipe().to_dict()  # as irc of earlier versions wrote and reads it


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "1.2", "nan", "x"])
def test_a_ratio_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="flops"):
        load_recipe(None, [f"flops={value}"])


@pytest.mark.parametrize(
    "flags", [("--flops", "0.3"), ("--flops", "0.8", "--dial", "0.3,0.9"), ("--flops", "0.3", "--dry-run")]
)
def test_a_target_out_of_reach_is_refused_before_any_work(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    outcome = irc_main(*convert_arguments(tmp_path / "b"), *flags)
    assert outcome.code == 2
    assert "flops 0.3" in outcome.sentence()
    assert "at least 0.4" in outcome.sentence()  # the head of the tiny model is a third of its FLOPs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_meets_the_ratio(irc_main: Any, convert_arguments: Arguments, tmp_path: Path, policy: str) -> None:
    outcome = irc_main(*convert_arguments(tmp_path / "b"), "--policy", policy, "--flops", "0.8")
    assert outcome.code == 0, outcome.err
    whole = POLICIES[policy].whole_units  # a unit is a tenth or a fifth of the tiny model's FLOPs
    assert outcome.json["flops_ratio"] == pytest.approx(0.8, abs=0.06 if whole else 0.015)


def test_a_comparison_holds_all_policies_at_equal_flops(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path
) -> None:
    made = convert_arguments(tmp_path / "c", eval_tokens=2048, rank=4, seq_len=16)
    drop = {"--rank", "--seq-len"}
    arguments = [a for i, a in enumerate(made) if a not in drop and made[i - 1] not in drop]
    arguments = ["compare", *arguments[1:], "--policies", "informed,skipgpt", "--seeds", "1"]
    refused = irc_main(*arguments, "--flops", "0.8,0.3")
    assert (refused.code, "informed-flops0.3-seed0" in refused.sentence()) == (2, True)
    assert not (tmp_path / "c").exists()
    outcome = irc_main(*arguments, "--flops", "0.8")
    assert outcome.code == 0, outcome.err
    groups = outcome.json["summary"]["groups"]
    assert [(group["policy"], group["flops"], group["sparsity"]) for group in groups] == [
        ("informed", 0.8, None),
        ("skipgpt", 0.8, None),
    ]
    assert [group["flops_ratio"] for group in groups] == pytest.approx([0.8, 0.8], abs=0.015)
    assert all(gap["flops"] == 0.8 for gap in outcome.json["summary"]["gaps"])
    assert irc_main(*arguments, "--flops", "0.8", "--resume").code == 0
