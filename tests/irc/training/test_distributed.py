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
from irc.bundle import ADAPTER
from irc.config import load_recipe
from irc.errors import InputError
from irc.pipeline import resolve
from irc.training.master_weights import MasterAdamW
from irc.training.sharding import check_batches, sharding_wanted

pytestmark = pytest.mark.slow
Arguments = Callable[..., list[str]]
# `accelerate launch --cpu` starts several processes by mpirun alone; --multi_gpu means torchrun, the device is ours.
_ACCELERATE = "accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node 2".split(),
    "accelerate": f"-m {_ACCELERATE} --main_process_port 0 --multi_gpu".split(),
    "fsdp2": f"-m {_ACCELERATE} --main_process_port 0 --use_fsdp --fsdp_version 2".split(),
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` says it
PACKAGE = str(Path(irc.__file__).parents[1])  # that this process tests: a script does not look where it was started
STAGES = ["--stages", "lff,router,lora"]
SETTINGS = {"lora__dropout": 0.0}  # each process draws its own dropout
# `irc`, with one more phase, that says how much of the mapped base a process holds as a copy of its own.
LOOKING = """
import sys
from irc import pipeline
from irc.cli import main

def look(conversion):
    name = str(conversion.base.shards[0].resolve())
    mappings = open("/proc/self/smaps").read().split("VmFlags")
    own = [part.split("Anonymous:")[1].split()[0] for part in mappings if name in part]
    sys.stderr.write(f"kB of the mapped base in copies: {own}\\n")  # at once: both processes speak

pipeline.PHASES = (*pipeline.PHASES, ("look", look))
sys.exit(main(sys.argv[1:]))
"""
# What torchrun does, with processes forked from one that has imported everything: `irc` whose first process dies, as by
# `kill -9`, when it puts its third checkpoint of the routers into its place; then `irc --resume`. Says how each ended.
KILLED = """
import os, signal, sys
from pathlib import Path
import irc.pipeline
from irc.cli import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

written = []

def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("router.checkpoint.safetensors"):
        written.append(event)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

def dying(command):
    sys.addaudithook(watch)
    return main(command)

def launch(work, command):
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, 2, **meeting, start_method="fork", max_restarts=0)
    try:
        ended = sorted(elastic_launch(config, work)(command).values())
    except ChildFailedError as error:
        ended = error.get_first_failure()[1].exitcode
    there = [*Path().glob("killed*"), *Path().glob("killed.partial/router.checkpoint.safetensors")]
    sys.stderr.write(f"\\nended {ended} {sorted(map(str, there))}\\n")

launch(dying, sys.argv[1:])
launch(main, [*sys.argv[1:], "--resume"])
"""
# `irc` for several commands, one after the other; how each ended.
REFUSED = """
import json, sys
from irc.cli import main

codes = [main(command) for command in json.loads(sys.argv[1])]
sys.stderr.write(f"\\ncodes {codes}\\n")
sys.exit(codes[-1])
"""
# Two weights' gradients come from all processes or from one, the third has none; then AdamW, which decays.
AVERAGING = """
import json, sys
import torch
from irc.training.master_weights import MasterAdamW
from irc.training.sharding import average_gradients

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}
for dtype in sys.argv[1:]:
    weights = {name: torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=getattr(torch, dtype))) for name in "abc"}
    adam = MasterAdamW([{"params": list(weights.values()), "lr": 0.1}], weight_decay=0.5)
    for step in range(3):
        loss = (2 * rank + 1) * weights["a"].square().sum() + (4 * weights["b"].sum() if rank == step % 2 else 0)
        loss.backward()
        adam.take_gradients()
        average_gradients([adam.master(weight) for weight in weights.values()])
        adam.step()
        adam.zero_grad()
    found[dtype] = {name: weight.tolist() for name, weight in weights.items()}
if rank == 0:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def run(arguments: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    usual = {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": PACKAGE}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **usual, **environment},
        cwd=tmp_path,
    )


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / ADAPTER) | load_file(bundle / "lora" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of bundles that several tests look at, each made once, and what was said while they were."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def single(irc_main: Any, convert_arguments: Arguments, made: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The bundle of one process, and its metrics."""
    output = made["folder"] / "single"
    if "single" not in made:
        done = irc_main(*convert_arguments(output, **SETTINGS), *STAGES)
        assert done.code == 0, done.err
        made["single"] = done.json
    return output, made["single"]


@pytest.fixture
def two(convert_arguments: Arguments, made: dict[str, Any]) -> Callable[..., tuple[Path, Any]]:
    """Give `two(launcher, recomputed)`: the bundle of two processes, and the run that made it."""

    def make(launcher: str, recomputed: bool = False) -> tuple[Path, Any]:
        name = f"{launcher}-recomputed" if recomputed else launcher
        folder = made["folder"] / name
        if name not in made:
            folder.mkdir()
            (folder / "looking.py").write_text(LOOKING)
            settings = {**SETTINGS, "activation_checkpointing": recomputed}  # of which `single` knows nothing
            arguments = [*convert_arguments(folder / "b", **settings), *STAGES, "--debug"]
            made[name] = run([*LAUNCHERS[launcher], str(folder / "looking.py"), *arguments], folder)
        assert made[name].returncode == 0, made[name].stderr
        return folder / "b", made[name]

    return make


@pytest.mark.parametrize(
    ("launcher", "recomputed"), [("torchrun", False), ("accelerate", False), ("fsdp2", False), ("fsdp2", True)]
)
def test_two_processes_equal_one(
    single: tuple[Path, dict[str, Any]], two: Callable[..., tuple[Path, Any]], launcher: str, recomputed: bool
) -> None:
    bundle, done = two(launcher, recomputed)
    assert done.stderr.count("converting ") == 2  # there were two
    metrics = json.loads(done.stdout)  # one object: only the first process speaks
    alone, expected = single
    one, found = weights(alone), weights(bundle)
    assert one.keys() == found.keys()
    for name in one:
        # fp32: the gradients of two halves are averaged instead of summed in one batch
        torch.testing.assert_close(found[name], one[name], rtol=0, atol=1e-5, msg=name)
    shards = re.findall(r"the layers' (\d+) frozen weights lie in shards, (\d+) of them", done.stderr)
    assert len(shards) == (2 if launcher == "fsdp2" else 0)
    assert all(0 < int(here) <= int(whole) / 2 * 1.01 for whole, here in shards)
    assert metrics["perplexity"]["routed"] == pytest.approx(expected["perplexity"]["routed"], rel=1e-2)
    assert metrics["perplexity"]["dense"] == pytest.approx(expected["perplexity"]["dense"], rel=1e-6)
    if sys.platform.startswith("linux"):
        assert re.findall("mapped base in copies: (.*)", done.stderr) == 2 * ["['0']"]
    assert {path.name for path in bundle.parent.iterdir()} - {"hf", "looking.py"} == {"b"}
    assert [name for name in one if "router" in name and float((one[name]).abs().max()) == 0] == []


def test_a_weight_whose_gradient_no_process_has_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "averaging.py").write_text(AVERAGING)
    done = run([*LAUNCHERS["torchrun"], str(tmp_path / "averaging.py"), "float32", "bfloat16"], tmp_path)
    assert done.returncode == 0, done.stderr
    averaged = json.loads(done.stdout)
    assert list(averaged) == ["float32", "bfloat16"]
    for dtype, found in averaged.items():
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
    two: Callable[..., tuple[Path, Any]], convert_arguments: Arguments, tmp_path: Path, launcher: str
) -> None:
    whole, _ = two(launcher)
    (tmp_path / "kill.py").write_text(KILLED)
    arguments = [*convert_arguments(tmp_path / "killed", **SETTINGS), *STAGES, "--debug"]
    done = run([str(tmp_path / "kill.py"), *arguments], tmp_path, **(FSDP2 if launcher == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr
    first, second = re.findall(r"^ended (.*)$", done.stderr, re.MULTILINE)
    left = ["killed.partial", "killed.partial.lock", "killed.partial/router.checkpoint.safetensors"]
    assert first == f"-{signal.SIGKILL} {left}"
    assert second == "[0, 0] ['killed']", done.stderr
    assert done.stderr.count("frozen weights lie in shards") == (4 if launcher == "fsdp2" else 0)
    one, found = weights(whole), weights(tmp_path / "killed")
    assert one.keys() == found.keys()
    assert [name for name in one if not torch.equal(one[name], found[name])] == []


def test_refusals_end_both_processes(convert_arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "irc_config.json").write_text("{}")
    commands = [convert_arguments(tmp_path / "there"), convert_arguments(tmp_path / "b", lff__batch_size=3)]
    (tmp_path / "refused.py").write_text(REFUSED)
    done = run([*LAUNCHERS["torchrun"], str(tmp_path / "refused.py"), json.dumps(commands)], tmp_path)
    assert done.returncode != 0
    assert re.findall(r"^codes (.*)$", done.stderr, re.MULTILINE) == 2 * ["[2, 2]"]
    assert "exists already" in done.stderr
    assert "lff.batch_size is 3, over 2 processes; give a multiple of 2" in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "refused.py", "hf"}  # no work was begun


@pytest.mark.parametrize(
    ("settings", "finished", "refused"),
    [
        ({"lff__batch_size": 3}, (), "lff.batch_size is 3"),
        ({"lff__batch_size": 3}, ("lff",), ""),
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
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", 2)  # which all share
    recipe = load_recipe(None, ["device=cpu", *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())])
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        check_batches(resolve(recipe), finished)


def test_fsdp_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharding_wanted()  # one process has nothing to share
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="add --fsdp_version 2"):
        sharding_wanted()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_wanted()
