"""`irc convert` from end to end: keys, agreement with `irc eval`, resuming, locking, and atomic output."""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irc.bundle.layout import ADAPTER
from irc.conversion import pipeline
from irc.errors import InputError
from irc.recipe.recipe import Recipe, load_recipe

Arguments = Callable[..., list[str]]
PATHS = [
    *("perplexity.dense", "perplexity.routed", "perplexity.ratio", "flops_ratio", "output", "model"),
    *("sparsity.target", "sparsity.realized", "sparsity.attention", "sparsity.ffn"),
    *("seconds.lff", "seconds.router", "seconds.evaluate", "data.fingerprint", "data.tokens", "data.seq_len"),
]


def untimed(value: Any) -> Any:
    """Drop what differs between two runs: times and the output's path."""
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if "seconds" not in key and key != "output"}
    return value


def recipe_of(arguments: list[str]) -> Recipe:
    """Return the recipe that the command line of `convert_arguments` means."""
    sets = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    recipe = load_recipe(None, sets)
    recipe.model, recipe.data = arguments[1], arguments[arguments.index("--data") + 1]
    recipe.rank, recipe.seq_len, recipe.device = 4, 16, "cpu"
    return recipe


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    found = load_file(bundle / ADAPTER)
    if (bundle / "lora").is_dir():
        found |= load_file(bundle / "lora" / "adapter_model.safetensors")
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_then_eval_agree(irc_main: Any, convert_arguments: Arguments, tmp_path: Path) -> None:
    done = irc_main(*convert_arguments(tmp_path / "b", sparsity=0.4))
    assert done.code == 0, done.err
    metrics = done.json
    for path in PATHS:
        value = metrics
        for key in path.split("."):
            value = value[key]
        assert value is not None, path
    assert metrics["output"] == str(tmp_path / "b")
    assert metrics == json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["sparsity"]["target"] == 0.4
    assert abs(metrics["sparsity"]["realized"] - 0.4) < 0.05  # 1,024 held-out tokens, routers of six steps
    assert abs(metrics["stages"]["router"]["calibration_sparsity"] - 0.4) < 0.01
    again = irc_main("eval", tmp_path / "b", "--json")
    assert again.code == 0, again.err
    for key in ("perplexity", "sparsity", "flops_ratio", "units"):
        assert again.json[key] == metrics[key]
    assert again.json["data"] == metrics["data"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({}, "fp32"), ({"avx512_bf16": True, "amx_bf16": False}, "fp32"), ({"amx_bf16": True}, "bf16")],
)
def test_training_is_in_bf16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pipeline.resolve(Recipe(device="cpu")).precision == precision
    assert pipeline.resolve(Recipe(device="cpu", precision="bf16")).precision == "bf16"


def test_eval_of_a_bf16_conversion_agrees(irc_main: Any, convert_arguments: Arguments, tmp_path: Path) -> None:
    metrics = irc_main(*convert_arguments(tmp_path / "b", lff__steps=0, router__steps=1), "--dtype", "bf16").json
    again = irc_main("eval", tmp_path / "b", "--json").json
    assert again["perplexity"] == metrics["perplexity"]


def test_eval_of_the_base_is_the_dense_figure(
    irc_main: Any, convert_arguments: Arguments, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    metrics = irc_main(*convert_arguments(tmp_path / "b")).json
    flags = ("--data", text_file, "--split", "heldout", "--seq-len", "16", "--tokens", "1024", "--json")
    plain = irc_main("eval", model_folder, *flags).json
    assert plain["perplexity"] == {"dense": pytest.approx(metrics["perplexity"]["dense"], rel=1e-6)}


PLACES = [("lff statistics", 16), ("lff", 2), ("teach", 1), ("router", 1), ("router", 5), ("threshold", 1), ("lora", 3)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The uninterrupted run, made once."""
    return {}


@pytest.mark.parametrize("place", [*PLACES, ("held-out text", 64)], ids=lambda place: f"{place[0]}-{place[1]}")
def test_resume_after_a_kill_is_bit_identical(
    convert_arguments: Arguments,
    bars: Any,
    killed: type[BaseException],
    whole: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    place: tuple[str, int],
    tmp_path: Path,
) -> None:
    def run(output: Path, progress: Any, **flags: bool) -> Any:
        recipe = recipe_of(convert_arguments(output))
        recipe.stages = ["lff", "router", "lora"]
        return pipeline.convert(recipe, output, progress, **flags)

    if not whole:
        whole["output"] = tmp_path_factory.mktemp("whole") / "b"
        whole["metrics"] = run(whole["output"], bars())
    output = tmp_path / "b"
    with pytest.raises(killed):
        run(output, bars(place))
    assert not output.exists()
    if place[0] == "lff statistics":
        assert list(tmp_path.iterdir()) == []  # nothing was done yet, nothing is left
    else:
        with pytest.raises(InputError, match=r"b\.partial"):
            run(output, bars())
    second = bars()
    metrics = run(output, second, resume=True)
    order = ["lff statistics", "lff", "teach", "router", "threshold", "lora", "threshold", "held-out text"]
    finished = {"teach": 2, "router": 2, "threshold": 2, "lora": 5, "held-out text": 7}.get(place[0], 0)
    # The statistics are in the first checkpoint's weights, and what was taught in those of router steps.
    begun = {("lff", 2): 1, ("router", 5): 1, ("threshold", 1): 1}.get(place, 0)
    assert second.names() == order[finished + begun :]
    assert untimed(metrics) == untimed(whole["metrics"])
    assert_same_bits(output, whole["output"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_resume_of_a_finished_bundle_returns_it(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = convert_arguments(tmp_path / "b")
    first = irc_main(*arguments).json
    monkeypatch.setattr(pipeline, "build_routed", None)
    again = irc_main(*arguments, "--resume")
    assert (again.code, again.json) == (0, first)
    other = irc_main(*convert_arguments(tmp_path / "b", sparsity=0.5), "--resume")
    assert other.code == 2
    assert re.search(r"sparsity .*0\.25.* 0\.5", other.sentence())


@pytest.mark.parametrize(
    ("setting", "value"), [("sparsity", 0.5), ("router__steps", 7), ("seed", 1), ("dtype", "bf16")]
)
def test_resume_with_other_settings_is_refused(
    convert_arguments: Arguments,
    bars: Any,
    killed: type[BaseException],
    tmp_path: Path,
    setting: str,
    value: object,
) -> None:
    output = tmp_path / "b"
    with pytest.raises(killed):
        pipeline.convert(recipe_of(convert_arguments(output)), output, bars(("lff", 2)))
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=setting.replace("__", r"\.")):
        pipeline.convert(recipe_of(convert_arguments(output, **{setting: value})), output, bars(), resume=True)
    assert files_of(tmp_path) == before
    metrics = pipeline.convert(recipe_of(convert_arguments(output, checkpoint_seconds=9)), output, bars(), resume=True)
    assert metrics["output"] == str(output)


@pytest.mark.parametrize("place", [("lff", 2), ("router", 5), ("held-out text", 64)], ids=lambda place: place[0])
def test_force_keeps_the_old_bundle_until_the_new_is_complete(
    convert_arguments: Arguments,
    bars: Any,
    killed: type[BaseException],
    place: tuple[str, int],
    tmp_path: Path,
) -> None:
    output = tmp_path / "b"
    quick = convert_arguments(output, lff__steps=4, router__steps=5)
    pipeline.convert(recipe_of(quick), output, bars())
    before = files_of(output)
    new = convert_arguments(output, seed=5)
    with pytest.raises(InputError, match=re.escape(str(output))):
        pipeline.convert(recipe_of(new), output, bars())
    with pytest.raises(killed):
        pipeline.convert(recipe_of(new), output, bars(place), force=True)
    assert files_of(output) == before
    pipeline.convert(recipe_of(new), output, bars(), force=True)
    assert json.loads((output / "metrics.json").read_text())["output"] == str(output)
    assert "seed: 5" in (output / "recipe.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_second_convert_into_one_folder_is_refused(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path
) -> None:
    with (tmp_path / "b.partial.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused = irc_main(*convert_arguments(tmp_path / "b"))
        forced = irc_main(*convert_arguments(tmp_path / "b"), "--force")
    assert (refused.code, forced.code) == (2, 2)
    assert "b.partial.lock" in refused.sentence()
    assert [path.name for path in tmp_path.iterdir()] == ["b.partial.lock"]


def test_a_lock_left_by_a_killed_run_does_not_hinder(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path
) -> None:
    (tmp_path / "b.partial.lock").write_text("")
    assert irc_main(*convert_arguments(tmp_path / "b")).code == 0


@pytest.mark.slow
def test_kill_9_in_the_router_stage_then_resume(
    irc_main: Any, convert_arguments: Arguments, start_irc: Any, tmp_path: Path
) -> None:
    settings = {"router__steps": 80}
    arguments = convert_arguments(tmp_path / "b", **settings)
    process = start_irc(arguments)
    checkpoint = tmp_path / "b.partial" / "router.checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    resumed = start_irc([*arguments, "--resume"])
    out, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    unbroken = irc_main(*convert_arguments(tmp_path / "c", **settings))
    assert unbroken.code == 0, unbroken.err
    assert untimed(json.loads(out)) == untimed(unbroken.json)
    assert_same_bits(tmp_path / "b", tmp_path / "c")
