"""The training loop of all stages, driven by accelerate and resumable from checkpoints to the same weights.

Everything random in a step depends only on (seed, step): a seeded sampler decides the data order, and generators seeded
by the step draw routing noise and dropout. A run that was killed and resumed ends with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from irc.errors import InputError, IrcError
from irc.files.tensors import write_safetensors
from irc.progress import Progress
from irc.training.master_weights import MasterAdamW
from irc.training.processes import join_group, plain_environment
from irc.training.sharding import average_gradients, broadcast_weights


class Objective(nn.Module):
    """A model with a loss.

    `forward(windows, step)` returns the scalar loss and the figures for the progress bar.

    Attributes:
        through_layers: Whether gradients pass through whole layers. Activation checkpointing helps only then.
    """

    through_layers = True

    def trainable(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with `params` (name to parameter) and `lr`."""
        raise IrcError(f"{type(self).__name__} has no parameters to train; this is a bug in irc, please report it")

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds besides the parameters."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up the state of a checkpoint, empty without one."""


@dataclass
class LoopSettings:
    """Settings of one run of the loop.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows per step, over all processes.
        schedule: Maps progress 0..1 to the factor of the learning rate.
        seed: Seed of the data order and of the randomness in each step.
        checkpoint: File to write and to resume from.
        checkpoint_seconds: Seconds between two checkpoints.
        weight_decay: Weight decay of AdamW.
        time_before: Seconds and processor seconds that the stage took before this loop. They are stored in checkpoints.
    """

    steps: int
    batch_size: int
    schedule: Callable[[float], float]
    seed: int
    checkpoint: Path
    checkpoint_seconds: float = 30.0
    weight_decay: float = 0.0
    time_before: tuple[float, float] = (0.0, 0.0)


@dataclass
class LoopResult:
    """Figures of a finished loop.

    Attributes:
        seconds: Wall-clock training time over all runs of the stage.
        tokens: Tokens read.
        figures: Figures of the last step.
        history: `[step, loss]` pairs, at most a hundred.
        cpu_seconds: Processor time over all runs of the stage.
        earlier_runs: Seconds and processor seconds of the earlier runs of this stage, which were killed.
        state: State of the objective.
    """

    seconds: float
    tokens: int
    figures: dict[str, float]
    history: list[list[float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    earlier_runs: tuple[float, float] = (0.0, 0.0)
    state: dict[str, float] = field(default_factory=dict)


def accelerator_for(device: str, precision: str) -> Accelerator:
    """Return an accelerator with the given precision that splits each batch over the processes.

    Raises:
        InputError: The environment does not describe a group of processes.
        IrcError: The other processes of the group did not come in time.
    """
    join_group(device)
    with plain_environment():
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )


def train(
    objective: Objective, windows: torch.Tensor, settings: LoopSettings, progress: Progress, accelerator: Accelerator
) -> LoopResult:
    """Train the parameters of an objective, starting from its checkpoint if there is one.

    Args:
        objective: The model and its loss.
        windows: int64 [windows, length].
        settings: Steps, batch size, schedule, checkpoint.
        progress: Updated after each step.
        accelerator: From `accelerator_for`.

    Raises:
        InputError: The checkpoint is damaged.
        IrcError: The loss is not finite, or a checkpoint cannot be written.
    """
    groups = objective.trainable()
    parameters: dict[str, nn.Parameter] = {}
    for index, group in enumerate(groups):
        parameters |= {f"{index}.{name}": parameter for name, parameter in group["params"].items()}
    adam = MasterAdamW(
        [{"params": list(g["params"].values()), "lr": g["lr"], "initial_lr": g["lr"]} for g in groups],
        settings.weight_decay,
    )
    first, resumed = _restore(settings.checkpoint, parameters, adam)
    objective.restore(resumed.state)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: settings.schedule(step / settings.steps), last_epoch=first - 1
    )
    loader = accelerator.prepare_data_loader(_loader(windows, settings))
    weights = [adam.master(parameter) for parameter in parameters.values()]
    # Only the trained weights are exchanged: DistributedDataParallel would copy the mapped base in each process.
    distributed = accelerator.num_processes > 1
    if distributed:
        broadcast_weights(weights)
        for parameter, weight in zip(parameters.values(), weights, strict=True):
            adam.set_weight(parameter, weight)
    batches = accelerator.skip_first_batches(loader, first) if first else loader
    objective.train()
    tokens_per_step = settings.batch_size * windows.shape[1]
    started = saved = time.monotonic()
    cpu_started = time.process_time()
    figures: dict[str, float] = dict(resumed.figures)
    for step, (batch,) in enumerate(batches, start=first):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        with accelerator.autocast():
            loss, step_figures = objective(batch, step)
        if not bool(torch.isfinite(loss)):
            remedy = "lower the learning rate of this stage" if step else "look for damaged weights in the model"
            raise IrcError(
                f"the loss is {loss.item()} at step {step}; {remedy}, or, if the model is in fp16, choose bf16 or fp32",
                options=("dtype",),
            )
        accelerator.backward(loss)
        adam.take_gradients()
        if distributed:
            average_gradients(weights)
        adam.step()
        scheduler.step()
        adam.zero_grad()
        figures = {"loss": loss.item(), **step_figures}
        now = time.monotonic()
        progress.update(step + 1, **figures, tokens_per_s=(step + 1 - first) * tokens_per_step / (now - started))
        if (step + 1) % max(1, settings.steps // 100) == 0:
            resumed.history.append([step + 1, figures["loss"]])
        if now - saved >= settings.checkpoint_seconds and accelerator.is_main_process:
            cpu_seconds = resumed.cpu_seconds + time.process_time() - cpu_started
            earlier_runs = resumed.earlier_runs if first else settings.time_before
            state = LoopResult(
                resumed.seconds + now - started,
                0,
                figures,
                resumed.history,
                cpu_seconds,
                earlier_runs,
                objective.state(),
            )
            _save(settings.checkpoint, parameters, adam, step + 1, state)
            saved = now
    objective.eval()
    return LoopResult(
        seconds=resumed.seconds + time.monotonic() - started,
        tokens=settings.steps * tokens_per_step,
        figures=figures,
        history=resumed.history,
        cpu_seconds=resumed.cpu_seconds + time.process_time() - cpu_started,
        earlier_runs=(
            resumed.earlier_runs[0] + resumed.seconds,
            resumed.earlier_runs[1] + resumed.cpu_seconds,
        ),
    )


def _loader(windows: torch.Tensor, settings: LoopSettings) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    dataset = TensorDataset(windows)
    total = settings.steps * settings.batch_size
    sampler = RandomSampler(dataset, num_samples=total, generator=generator)
    return DataLoader(dataset, batch_size=settings.batch_size, sampler=sampler)


def step_noise(units: Sequence[str], seed: int, step: int, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Draw the uniform noise of one step. It does not depend on the number of processes.

    Args:
        units: Names of the units.
        seed: Seed of the run.
        step: Step of the loop.
        shape: Batch and tokens of this process.

    Returns:
        This process's rows of the draw, float32 [batch, tokens] by unit.
    """
    from accelerate.state import PartialState

    state = PartialState()
    rows, tokens = shape
    generator = torch.Generator().manual_seed((seed + 1) * 7_368_787 + step)
    draws = torch.rand(len(units), rows * state.num_processes, tokens, generator=generator)
    start = rows * state.process_index
    return {unit: draws[index, start : start + rows] for index, unit in enumerate(units)}


def _save(path: Path, parameters: Mapping[str, nn.Parameter], adam: MasterAdamW, step: int, state: LoopResult) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        weight = adam.master(parameter)
        tensors[f"weight/{name}"] = weight.detach().cpu().clone()
        for key, value in adam.state[weight].items():
            tensors[f"{key}/{name}"] = value.detach().cpu().clone()
    facts = {
        "step": step,
        "seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "figures": state.figures,
        "history": state.history,
        "spent": state.earlier_runs,
        "objective": state.state,
    }
    write_safetensors(path, tensors, {"irc": json.dumps(facts)})


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], adam: MasterAdamW) -> tuple[int, LoopResult]:
    """Read a checkpoint into the parameters and the optimizer; return the next step and the figures so far."""
    if not path.is_file():
        return 0, LoopResult(0.0, 0, {})
    try:
        with safe_open(path, framework="pt") as opened:
            facts = json.loads(opened.metadata()["irc"])
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not a mapping
        resumed = LoopResult(
            seconds=facts["seconds"],
            tokens=0,
            figures=facts["figures"],
            history=facts["history"],
            cpu_seconds=facts.get("cpu_seconds", 0.0),
            earlier_runs=tuple(facts.get("spent", (0.0, 0.0))),
            state=facts.get("objective", {}),
        )
        for name, parameter in parameters.items():
            found, expected = tensors[f"weight/{name}"].shape, parameter.shape
            if found != expected:
                raise ValueError(f"{name} has shape {list(found)}, expected {list(expected)}")
    except Exception as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); delete it and train this stage again") from error
    for name, parameter in parameters.items():
        adam.set_weight(parameter, tensors[f"weight/{name}"])
        weight = adam.master(parameter)
        adam.state[weight] = {}
        for key, tensor in tensors.items():
            part, _, owner = key.partition("/")
            if owner == name and part != "weight":
                adam.state[weight][part] = tensor if part == "step" else tensor.to(weight)
    return facts["step"], resumed
