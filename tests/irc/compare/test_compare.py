"""`irc compare`: its cells, its figures, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.compare import run
from irc.compare.cells import Cell, Plan, read_variants
from irc.compare.labels import flops_of, note_of, realized_of
from irc.compare.results import catch_up, gap_closed, groups
from irc.errors import InputError
from irc.recipe.recipe import Recipe
from irc.recipe.target import Target

Main = Callable[..., Any]
TARGET = Target("sparsity", 0.25)


def test_a_whole_comparison(irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "c"
    more = "--policies informed,skipgpt,mod,random,static --sparsities 0.25,0.5 --seeds 2 --budgets 0.5 --lora".split()
    more += "--ranks 2,3 --calibration-tokens 256,512 --kv-sweep 0.2,1 --variant frozen:router.forecaster_lr=0".split()
    outcome = irc_main(*arguments(out, *more))
    assert outcome.code == 0, outcome.err
    results = outcome.json
    assert results == json.loads((out / "results.json").read_text())
    # 5 policies x 2 targets x 2 seeds, less static's second seed; budgets of the three that learn; and so on.
    counts = {"plain": 18, "budget": 12, "sweep": 4, "variant": 4, "lora": 22}
    assert len(results["cells"]) == sum(counts.values())
    found = {(g["policy"], g["sparsity"], g["lora"], g["variant"]): g for g in results["summary"]["groups"]}
    assert found["dense", 0.0, True, ""]["realized"]["mean"] == 0.0
    assert found["static", 0.5, False, ""]["realized"]["mean"] == 0.5
    assert found["informed", 0.25, False, ""]["seeds"] == 2
    assert found["mod", 0.5, False, ""]["realized"]["mean"] == pytest.approx(0.5)
    assert {gap["against"] for gap in results["summary"]["gaps"]} <= {"skipgpt", "mod", "random", "static"}
    assert [sweep["sparsity"] for sweep in results["kv_sweep"]] == [0.25, 0.5]
    page = (out / "report.html").read_text()
    # KL over FLOPs 4 (two texts, LoRA), perplexity over FLOPs 2, over time 2 (targets), by kind 1, by layer 6,
    # recoverability 1, three sweeps.
    assert page.count("<svg") == 19
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []  # nothing is loaded from elsewhere


def test_cells_share_the_stages_that_they_begin_with(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = "--policies informed --sparsities 0.25,0.5 --seeds 1 --lora".split()
    outcome = irc_main(*arguments(tmp_path / "c", *more))
    assert outcome.code == 0, outcome.err
    cells = {cell["name"]: cell["figures"]["stages"] for cell in outcome.json["cells"]}
    lff = {stages["lff"]["seconds"] for name, stages in cells.items() if "dense" not in name}
    assert len(lff) == 1  # the very same stage
    for share in ("0.25", "0.5"):
        plain, lora = cells[f"informed-{share}-seed0"], cells[f"informed-{share}-lora-seed0"]
        assert plain["router"]["seconds"] == lora["router"]["seconds"]
    assert cells["informed-0.25-seed0"]["router"]["seconds"] != cells["informed-0.5-seed0"]["router"]["seconds"]


def test_stages_of_other_routers_are_not_shared(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A router of the bottleneck has another shape, and every stage saves the routers."""
    more = "--policies informed --sparsities 0.5 --seeds 1".split()
    variants = ["--variant", "bottleneck:router.reads=bottleneck", "--variant", "rank=low:rank=3"]
    outcome = irc_main(*arguments(tmp_path / "c", *more, *variants))
    assert outcome.code == 0, outcome.err
    assert [cell["variant"] for cell in outcome.json["cells"]] == ["", "bottleneck", "rank=low"]
    again = irc_main(*arguments(tmp_path / "c", *more, "--variant", "rank=low:rank=2", "--resume"))
    assert again.code == 2
    assert "rank = 3" in again.sentence()  # no old figures under new settings


def test_a_variant_may_hold_a_list() -> None:
    found = read_variants(["two:lora.targets=[q_proj,v_proj],router.steps=3", "one: rank = 4"])
    assert found == {"two": ("lora.targets=[q_proj,v_proj]", "router.steps=3"), "one": ("rank = 4",)}


def test_a_killed_comparison_goes_on(
    irc_main: Main,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: type[BaseException],
) -> None:
    out, more = tmp_path / "c", "--policies informed,skipgpt --sparsities 0.5 --seeds 1".split()
    whole = run.convert
    made: list[str] = []

    def dies(recipe: Recipe, folder: Path, *rest: Any, **options: Any) -> Any:
        if made:
            raise killed
        made.append(folder.name)
        return whole(recipe, folder, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, "convert", dies)
        with pytest.raises(killed):
            irc_main(*arguments(out, *more))
    assert not (out / "results.json").exists()
    refused = irc_main(*arguments(out, *more))
    assert refused.code == 2
    assert str(out) in refused.sentence()
    assert "(--resume, --force)" in refused.sentence()
    before = (out / "cells" / made[0] / "metrics.json").stat().st_mtime_ns
    outcome = irc_main(*arguments(out, *more, "--resume"))
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["cells"]) == 2
    assert (out / "cells" / made[0] / "metrics.json").stat().st_mtime_ns == before


def test_an_interrupted_comparison_says_in_which_cell(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*rest: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "convert", interrupted)
    outcome = irc_main(*arguments(tmp_path / "c", *"--policies skipgpt --sparsities 0.5 --seeds 2 --force".split()))
    assert outcome.code == 130
    assert "cells 0/2, cell skipgpt-0.5-seed0" in outcome.sentence()
    command = outcome.sentence().partition("irc compare ")[2].split()
    assert command[-1] == "--resume"
    assert str(tmp_path / "c") in command
    assert "--force" not in command


@pytest.mark.slow
def test_jobs_give_the_same_figures(irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    more = "--policies skipgpt,static --sparsities 0.5 --seeds 1".split()
    one = irc_main(*arguments(tmp_path / "one", *more))
    two = irc_main(*arguments(tmp_path / "two", *more, "--jobs", "2"))
    assert (one.code, two.code) == (0, 0), two.err
    for alone, apart in zip(one.json["cells"], two.json["cells"], strict=True):
        # Other numbers of threads add in another order.
        ours, theirs = alone["figures"]["perplexity"]["routed"], apart["figures"]["perplexity"]["routed"]
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_a_cell_that_fails_in_its_process_is_named(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short to have held-out text")
    more = f"--policies skipgpt --sparsities 0.5 --seeds 1 --jobs 2 --data {tmp_path / 'short.txt'}".split()
    outcome = irc_main(*arguments(tmp_path / "c", *more))
    assert outcome.code == 1
    assert outcome.sentence().startswith("cell skipgpt-0.5-seed0: ")
    assert "exit code 2" in outcome.sentence()
    assert "short.txt" in outcome.sentence()


REFUSALS = [
    (("--policies", "informed,greedy"), ("'greedy'", "informed, skipgpt, mod, random, static")),
    (("--policies", ""), ("--policies",)),
    (("--policies", "mod,mod"), ("--policies", "mod, mod")),
    (("--sparsities", "0.2,x"), ("--sparsities", "'0.2,x'")),
    (("--sparsities", "1.5"), ("--sparsities", "'1.5'")),
    (("--budgets", "1"), ("--budgets", "between 0 and 1")),
    (("--ranks", "0"), ("--ranks", "'0'")),
    (("--ranks", "4", "--policies", "skipgpt"), ("--ranks", "--policies")),
    (("--calibration-tokens", "4", "--policies", "skipgpt"), ("--calibration-tokens", "--policies")),
    (("--variant", "frozen"), ("--variant", "'frozen'", "NAME:KEY=VALUE")),
    (("--variant", "x:router.nothing=1"), ("cell informed-0.25-x-seed0", "router.nothing")),
    (("--variant", "x:router.lr=fast"), ("cell informed-0.25-x-seed0", "router.lr is 'fast'")),
    (("--set", "eval_split=all"), ("--set", "eval_split is 'all'")),
    (("--variant", "a:sparsity=0.6"), ("--variant", "a changes sparsity")),
    (("--variant", "a:eval_split=validation"), ("--variant", "a changes eval_split")),
    (("--variant", "a:router.steps=2", "--variant", " a:router.steps=3"), ("--variant", "'a'")),
    (("--lora", "--variant", "lora:router.steps=2"), ("--variant", "informed-0.25-lora-seed0")),
    (("--sparsities", "0.25,0.25000001"), ("--sparsities", "informed-0.25-seed0")),
    (("--ranks", "64"), ("--ranks", "64", "32")),
]


@pytest.mark.parametrize(("more", "expected"), REFUSALS, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line(
    irc_main: Main,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    more: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    outcome = irc_main(*arguments(tmp_path / "c", *more))
    assert outcome.code == 2
    for part in expected:
        assert part in outcome.sentence()
    assert not (tmp_path / "c").exists()


def test_a_folder_of_another_comparison_is_refused(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, more = tmp_path / "c", "--policies static --sparsities 0.5 --seeds 1".split()
    assert irc_main(*arguments(out, *more)).code == 0
    facts = json.loads((out / "compare.json").read_text())
    for change, expected in (
        ({"base_identity": "0" * 64}, facts["model"]),
        ({"data": {"name": "other", "fingerprint": "0"}}, "(other)"),
        ({"recipe": facts["recipe"] | {"rank": 7}}, "rank = 7"),
    ):
        (out / "compare.json").write_text(json.dumps(facts | change))
        outcome = irc_main(*arguments(out, *more, "--resume"))
        assert (outcome.code, expected in outcome.sentence()) == (2, True), outcome.err
    (out / "compare.json").write_text("{")
    assert str(out / "compare.json") in irc_main(*arguments(out, *more, "--resume")).sentence()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    outcome = irc_main(*arguments(tmp_path / "mine", *more, "--force"))
    assert (outcome.code, str(tmp_path / "mine") in outcome.sentence()) == (2, True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def row(policy: str, ppl: float, *, seed: int = 0, variant: str = "", seconds: float = 10.0, lora: bool = False) -> Any:
    stages = {"router": {"seconds": seconds, "cpu_seconds": 2 * seconds}}
    sparsity = {"realized": 0.25, "attention": 0.2, "ffn": 0.3}
    figures = {"perplexity": {"dense": 10.0, "routed": ppl, "ratio": ppl / 10}, "sparsity": sparsity, "stages": stages}
    place = 0.0 if policy == "dense" else 0.25
    return {
        **{
            "name": "",
            "policy": policy,
            "sparsity": place,
            "seed": seed,
            "lora": lora,
            "variant": variant,
            "swept": "",
            "changes": [] if variant == "" else [variant],
        },
        "figures": figures | {"flops_ratio": 0.8},
    }


def test_the_gap_is_that_of_log_perplexities() -> None:
    rows = [row("informed", 10 * math.exp(0.1)), row("skipgpt", 10 * math.exp(0.4))]
    found = gap_closed(rows, TARGET, False)
    assert found is not None
    assert found["closed"]["mean"] == pytest.approx(0.75)
    assert gap_closed(rows, Target("sparsity", 0.4), False) is None


def test_the_gap_in_kl_is_over_the_further_texts() -> None:
    rows = [row("informed", 11.0), row("skipgpt", 12.0)]
    assert gap_closed(rows, TARGET, False)["kl_closed"] is None  # type: ignore[index]  # of an earlier version
    for cell, kls in zip(rows, ((0.1, 0.3), (0.5, 1.1)), strict=True):
        cell["figures"]["fidelity"] = {"kl": 0.05, "top1": 0.9}
        cell["figures"]["texts"] = [
            {"name": name, "fidelity": {"kl": kl, "top1": 0.9}, "flops_ratio": flops}
            for name, kl, flops in zip(("prose", "code"), kls, (0.8, 0.9), strict=True)
        ]
    assert gap_closed(rows, TARGET, False)["kl_closed"]["mean"] == pytest.approx(0.75)  # type: ignore[index]
    found = groups(rows)[0]
    assert (found["kl"]["mean"], found["main_kl"]["mean"]) == pytest.approx((0.2, 0.05))
    assert (found["texts_flops_ratio"], found["flops_ratio"]) == pytest.approx((0.85, 0.8))


def test_a_cell_that_missed_its_target_is_marked_everywhere() -> None:
    """What skips less is closer to the dense model, whatever the policy is worth."""
    rows = [row("informed", 10.5), row("skipgpt", 12.0), row("informed", 10.1, variant="router.steps=5", seconds=1.0)]
    for missing in (rows[0], rows[2]):
        missing["figures"]["sparsity"]["realized"] = 0.2
    gap = gap_closed(rows, TARGET, False)
    assert gap is not None
    assert gap["missed"] == ["informed"]
    assert "informed missed the target" in note_of(gap)
    assert [(group["missed"], "missed" in realized_of(group)) for group in groups(rows)] == [
        (1, True),
        (0, False),
        (1, True),
    ]
    rows[0]["flops"], rows[0]["sparsity"] = 0.85, None
    (group,) = groups(rows[:1])
    assert group["missed"] == 1  # its FLOPs ratio is 0.8
    assert ("missed" in flops_of(group), "missed" in realized_of(group)) == (True, False)
    rows[0]["flops"], rows[0]["sparsity"] = None, 0.25
    caught = catch_up(rows, TARGET)
    assert caught is not None
    assert caught["reached"] == 0
    rows[0]["figures"]["sparsity"]["realized"] = 0.235
    near = gap_closed(rows, TARGET, False)
    assert near is not None
    assert (near["missed"], note_of(near)) == ([], "")


def test_static_stands_for_itself_at_every_seed() -> None:
    rows = [row("informed", 10 * math.exp(0.1), seed=seed) for seed in (0, 1)] + [row("static", 10 * math.exp(0.2))]
    found = gap_closed(rows, TARGET, False, "static")
    assert found is not None
    assert (found["seeds"], found["closed"]["mean"]) == (2, pytest.approx(0.5))


def test_with_lora_the_gap_is_to_the_dense_model_of_the_same_budget() -> None:
    rows = [
        row("dense", 8.0, lora=True),
        row("informed", 8 * math.exp(0.1), lora=True),
        row("skipgpt", 8 * math.exp(0.2), lora=True),
    ]
    found = gap_closed(rows, TARGET, True)
    assert found is not None
    assert found["closed"]["mean"] == pytest.approx(0.5)


def test_with_lora_a_ratio_is_over_the_dense_model_of_the_same_budget_and_seed() -> None:
    rows = [row("dense", 8.0, lora=True), row("dense", 5.0, lora=True, seed=1)]
    rows += [row("informed", 8.8, lora=True), row("informed", 6.0, lora=True, seed=1), row("informed", 11.0)]
    found = {(group["policy"], group["lora"]): group for group in groups(rows)}
    assert found["informed", True]["ratio"]["mean"] == pytest.approx((1.1 + 1.2) / 2)
    assert found["informed", True]["dense"] == pytest.approx(6.5)
    assert found["informed", False]["ratio"]["mean"] == pytest.approx(1.1)
    assert found["dense", True]["ratio"]["mean"] == pytest.approx(1.0)


def test_catching_up_takes_the_shortest_training_that_is_no_worse() -> None:
    rows = [
        row("skipgpt", 12.0, seconds=100),
        row("informed", 11.0, seconds=110),
        row("informed", 11.5, variant="router.steps=50", seconds=60),
        row("informed", 13.0, variant="router.steps=25", seconds=35),
        row("informed", 10.5, variant="router.lr=1", seconds=1),  # another method, not another budget
    ]
    found = catch_up(rows, TARGET)
    assert found is not None
    assert (found["share"]["mean"], found["budgets"], found["reached"]) == (0.6, ["router.steps=50"], 1)
    assert catch_up([row("skipgpt", 10.0), row("informed", 11.0)], TARGET)["reached"] == 0  # type: ignore[index]


def test_groups_give_mean_and_spread_over_seeds() -> None:
    (group,) = groups([row("mod", 11.0), row("mod", 13.0, seed=1)])
    assert group["perplexity"] == pytest.approx({"mean": 12.0, "std": math.sqrt(2), "min": 11.0, "max": 13.0})
    assert group["seeds"] == 2


def test_names_of_cells_are_folders() -> None:
    cell = Cell("informed", 0.25, 1, True, "a/b c", ())
    assert cell.name == "informed-0.25-lora-a_b_c-seed1"
    plan = Plan(["informed"], [0.25], budgets=[0.5, 0.5])
    assert [c.name for c in plan.cells(Recipe())] == ["informed-0.25-seed0", "informed-0.25-router.steps=60-seed0"]


def test_variants_are_read_whole() -> None:
    assert read_variants(["a:x=1,y=[1]", "b:z=2"]) == {"a": ("x=1", "y=[1]"), "b": ("z=2",)}
    with pytest.raises(InputError, match="'a'"):
        read_variants(["a:x=1", "a:x=2"])
