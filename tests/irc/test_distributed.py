"""Two processes (gloo, CPU) train to the weights of one process at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irc.bundle import ADAPTER

pytestmark = pytest.mark.slow
Arguments = Callable[..., list[str]]
# `accelerate launch --cpu` starts several processes by mpirun alone; --multi_gpu means torchrun, the device is ours.
_ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2".split(),
    "accelerate": f"{_ACCELERATE} --dynamo_backend no --main_process_port 0".split(),
}
STAGES = ["--stages", "lff,router,lora"]
SETTINGS = {"lora__dropout": 0.0}  # each process draws its own dropout


def run(module: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")},
    )


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / ADAPTER) | load_file(bundle / "lora" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """The run of one process, made once."""
    return {}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(
    irc_main: Any,
    convert_arguments: Arguments,
    single: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    launcher: str,
) -> None:
    if not single:
        single["output"] = tmp_path_factory.mktemp("single") / "b"
        done = irc_main(*convert_arguments(single["output"], **SETTINGS), *STAGES)
        assert done.code == 0, done.err
        single["metrics"] = done.json
    arguments = [*convert_arguments(tmp_path / "b", **SETTINGS), *STAGES]
    done = run([*LAUNCHERS[launcher], "-m", "irc", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("converting ") == 2  # there were two
    metrics = json.loads(done.stdout)  # one object: only the first process speaks
    one, two = weights(single["output"]), weights(tmp_path / "b")
    assert one.keys() == two.keys()
    for name in one:
        # fp32: the gradients of two halves are averaged instead of summed in one batch
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
    assert metrics["perplexity"]["routed"] == pytest.approx(single["metrics"]["perplexity"]["routed"], rel=1e-2)
    assert metrics["perplexity"]["dense"] == pytest.approx(single["metrics"]["perplexity"]["dense"], rel=1e-6)
    left = {path.name for path in tmp_path.iterdir()} - {"hf"}
    assert left == {"b"}
    assert [name for name in one if "router" in name and float((one[name]).abs().max()) == 0] == []


def test_a_failure_of_two_processes_ends_both(convert_arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "irc_config.json").write_text("{}")
    done = run([*LAUNCHERS["torchrun"], "-m", "irc", *convert_arguments(tmp_path / "b")], tmp_path)
    assert done.returncode != 0
    assert "exists already" in done.stderr
    assert done.stdout == ""
