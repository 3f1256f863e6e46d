"""Two processes (gloo, CPU) train to the weights of one process at the same global batch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

import irc
from irc.bundle.layout import ADAPTER
from irc.cli import main
from irc.conversion.pipeline import resolve
from irc.errors import InputError
from irc.recipe.recipe import load_recipe
from irc.training.master_weights import MasterAdamW
from irc.training.sharding import check_batches, settle_batches, sharding_wanted
from tests.irc.forked import Forked
from tests.irc.training import pairs
from tests.irc.training.pairs import averaging, caching, dying, ending, launched, looking, several

pytestmark = pytest.mark.slow
Arguments = Callable[..., list[str]]
Two = Callable[[str], tuple[Path, str, str]]
# `accelerate launch --cpu` needs mpirun for several processes; --multi_gpu uses torchrun, and we choose the device.
_ACCELERATE = "accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node 2".split(),
    "accelerate": f"-m {_ACCELERATE} --main_process_port 0 --multi_gpu".split(),
    "fsdp2": f"-m {_ACCELERATE} --main_process_port 0 --use_fsdp --fsdp_version 2".split(),
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` sets it
PACKAGE = str(Path(irc.__file__).parents[1])  # a script does not import from the folder where it was started
STAGES = ["--stages", "lff,router,lora"]
# Each process draws its own dropout. Taught routers learn, too, which they do not by default.
SETTINGS = {"lora__dropout": 0.0, "router__lr": 3e-4}


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    usual = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": PACKAGE}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **usual},
        cwd=folder,
    )


def fork(folder: Path, function: Callable[..., Any], argument: Any, **environment: str) -> tuple[str, str, Any]:
    """Run a function in two processes without a launcher; return their output and how they ended."""
    process = Forked(launched, function, argument, folder=folder / "said", environment=environment)
    out, err = process.communicate(timeout=240)
    (ended,) = re.findall(r"^ended (.*)$", err, re.MULTILINE)
    return out, err, json.loads(ended)


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / ADAPTER) | load_file(bundle / "lora" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of the bundles that several tests share, and the output of the runs that made them."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def single(irc_main: Any, convert_arguments: Arguments, made: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The bundle that one process makes, and its metrics."""
    output = made["folder"] / "single"
    if "single" not in made:
        done = irc_main(*convert_arguments(output, **SETTINGS), *STAGES)
        assert done.code == 0, done.err
        made["single"] = done.json
    return output, made["single"]


@pytest.fixture
def two(convert_arguments: Arguments, made: dict[str, Any]) -> Two:
    """Give `two(launcher)`: the bundle that two processes make, and their stdout and stderr."""

    def make(launcher: str) -> tuple[Path, str, str]:
        folder = made["folder"] / launcher
        arguments = [*convert_arguments(folder / "b", **SETTINGS), *STAGES, "--debug"]
        if launcher not in made:
            folder.mkdir()
            if launcher == "fsdp2-recomputed":  # one process was not run with these settings
                recomputed = [*arguments, "--set", "activation_checkpointing=true"]
                out, err, ended = fork(made["folder"], looking, recomputed, **FSDP2)
                made[launcher] = out, err, ended == [0, 0]
            else:
                done = run([*LAUNCHERS[launcher], pairs.__file__, *arguments], folder)
                made[launcher] = done.stdout, done.stderr, done.returncode == 0
        out, err, well = made[launcher]
        assert well, err
        return folder / "b", out, err

    return make


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "fsdp2-recomputed"])
def test_two_processes_equal_one(single: tuple[Path, dict[str, Any]], two: Two, launcher: str) -> None:
    bundle, out, err = two(launcher)
    assert err.count("kB of the mapped base") == 2  # from both processes
    metrics = json.loads(out)  # one object, because only the first process prints
    assert err.count("converting ") == len(re.findall(r"^router \d", err, re.MULTILINE)) == 1
    alone, expected = single
    one, found = weights(alone), weights(bundle)
    assert one.keys() == found.keys()
    for name in one:
        # fp32: the gradients of two halves are averaged instead of summed in one batch
        torch.testing.assert_close(found[name], one[name], rtol=0, atol=1e-5, msg=name)
    shards = re.findall(r"sharded: (\d+) in total, (\d+) in this process", err)
    assert len(shards) == (2 if launcher.startswith("fsdp2") else 0)
    assert all(0 < int(here) <= int(whole) / 2 * 1.01 for whole, here in shards)
    assert metrics["perplexity"]["routed"] == pytest.approx(expected["perplexity"]["routed"], rel=1e-2)
    assert metrics["perplexity"]["dense"] == pytest.approx(expected["perplexity"]["dense"], rel=1e-6)
    if sys.platform.startswith("linux"):
        assert re.findall("mapped base in copies: (.*)", err) == 2 * ["['0']"]
    assert {path.name for path in bundle.parent.iterdir()} - {"hf"} == {"b"}
    assert [name for name in one if "router" in name and float((one[name]).abs().max()) == 0] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_whose_gradient_no_process_has_is_left_alone(tmp_path: Path, dtype: str) -> None:
    _, err, ended = fork(tmp_path, averaging, dtype)
    assert isinstance(ended, list), err
    found, other = ended
    assert found == other
    weights = {name: torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=getattr(torch, dtype))) for name in "abc"}
    adam = MasterAdamW([{"params": list(weights.values()), "lr": 0.1}], weight_decay=0.5)
    for _ in range(3):  # one process with the mean of the two losses
        (2 * weights["a"].square().sum() + 2 * weights["b"].sum()).backward()
        adam.step()
        adam.zero_grad()
    assert found["c"] == [1.0, -2.0]
    assert found == {name: pytest.approx(weight.tolist(), rel=1e-6) for name, weight in weights.items()}
    assert found["a"] != [1.0, -2.0] != found["b"]


@pytest.mark.parametrize("launcher", ["torchrun", "fsdp2"])
def test_two_killed_processes_continue_to_the_same_bits(
    two: Two, convert_arguments: Arguments, tmp_path: Path, launcher: str
) -> None:
    whole, _, _ = two(launcher)
    work = tmp_path / "work"
    arguments = [*convert_arguments(work / "killed", **SETTINGS), *STAGES, "--debug"]
    environment = FSDP2 if launcher == "fsdp2" else {}
    _, err, ended = fork(tmp_path / "first", dying, arguments, **environment)
    assert ended == -signal.SIGKILL, err
    assert sorted(path.name for path in work.iterdir()) == ["killed.partial", "killed.partial.lock"]
    assert (work / "killed.partial" / "router.checkpoint.safetensors").is_file()
    _, again, ended = fork(tmp_path / "second", main, [*arguments, "--resume"], **environment)
    assert ended == [0, 0], again
    assert [path.name for path in work.iterdir()] == ["killed"]
    assert (err + again).count("frozen weights of the layers are sharded") == (4 if launcher == "fsdp2" else 0)
    one, found = weights(whole), weights(work / "killed")
    assert one.keys() == found.keys()
    assert [name for name in one if not torch.equal(one[name], found[name])] == []


def test_refusals_end_both_processes(convert_arguments: Arguments, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "there").mkdir(parents=True)
    (work / "there" / "irc_config.json").write_text("{}")
    commands = [convert_arguments(work / "there"), convert_arguments(work / "b", lff__batch_size=3)]
    out, err, ended = fork(tmp_path, several, commands)
    assert ended == [[2, 2], [2, 2]], err
    assert "--force" in err
    assert re.search("lff.batch_size is 3, .*2 processes", err)
    assert out == ""
    assert fork(tmp_path, ending, commands[0])[2] == 2
    assert [path.name for path in work.iterdir()] == ["there"]  # the work did not begin


def test_one_process_samples_the_own_text(convert_arguments: Arguments, tmp_path: Path) -> None:
    command = [*convert_arguments(tmp_path / "b", self_tokens=2000), "--data", "self"]
    out, err, ended = fork(tmp_path, caching, (str(tmp_path / "hf"), command))
    assert ended == [0, 0], err
    assert json.loads(out)["data"]["name"].endswith("text.txt + self")
    assert len(list((tmp_path / "hf/irc/own-text").iterdir())) == 1
    assert len(re.findall(r"^own text \d", err, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("settings", "finished", "refused"),
    [
        ({"lff__batch_size": 3, "lff__steps": 1}, (), "lff.batch_size is 3"),
        ({"lff__batch_size": 3, "lff__steps": 1}, ("lff",), ""),
        ({"lff__batch_size": 3, "lff__steps": 0}, (), ""),
        ({"router__batch_size": 3}, (), "router.batch_size is 3"),
        ({"router__batch_size": 3, "policy": "static"}, (), ""),
        ({"router__batch_size": 3, "policy": "skipgpt"}, (), "router.batch_size is 3"),
        ({"router__batch_size": 3, "policy": "random"}, (), "router.batch_size is 3"),
        ({"router__batch_size": 3, "policy": "random", "router__forecaster_lr": 0.0}, (), ""),
        ({"lora__batch_size": 3}, (), ""),  # there is no stage lora
    ],
)
def test_only_batches_that_are_trained_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], finished: tuple[str, ...], refused: str
) -> None:
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", 2)  # all instances share this state
    recipe = load_recipe(None, ["device=cpu", *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())])
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        check_batches(resolve(recipe), finished)


@pytest.mark.parametrize(
    ("processes", "seq_len", "sizes"),
    [(1, 1024, (2, 1, 2)), (1, 256, (8, 4, 8)), (2, 512, (4, 2, 4)), (4, 1024, (4, 4, 4)), (3, 256, (6, 3, 6))],
)
def test_a_batch_holds_the_tokens_of_a_step_and_a_window_per_process(
    monkeypatch: pytest.MonkeyPatch, processes: int, seq_len: int, sizes: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", processes)
    recipe = resolve(load_recipe(None, ["device=cpu", f"seq_len={seq_len}"]))
    settle_batches(recipe)
    assert (recipe.lff.batch_size, recipe.router.batch_size, recipe.lora.batch_size) == sizes
    check_batches(recipe)
    recipe.router.batch_size = 12
    settle_batches(recipe)  # what was given stays
    assert recipe.router.batch_size == 12


def test_fsdp_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharding_wanted()  # one process has nothing to share
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match=r"version 1 .*--fsdp_version 2"):
        sharding_wanted()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_wanted()
