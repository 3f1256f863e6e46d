"""One training loop for all stages: accelerate drives it, checkpoints make it resumable to the bit.

Everything random in a step is a function of (seed, step): data order comes from a seeded sampler, routing
noise and dropout from generators seeded by the step. A run that was killed continues to the same weights.
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
from irc.training.sharding import average_gradients, same_weights


class Objective(nn.Module):
    """A model with a loss.

    `forward(windows, step)` returns the scalar loss and a dict of figures to show. `through_layers` says whether
    gradients pass through whole layers, which then can be computed again in place of being kept.
    """

    through_layers = True

    def trainable(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with `params` (name to parameter) and `lr`."""
        raise IrcError(f"{type(self).__name__} names no parameters to train; this is a fault of irc")


@dataclass
class LoopSettings:
    """How one stage runs.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows a step, over all processes.
        schedule: Factor of the learning rate at progress 0..1.
        seed: Of data order and per-step randomness.
        precision: Autocast of the forward pass, `fp32` or `bf16`.
        checkpoint: File to write and to continue from.
        checkpoint_seconds: Time between two writes.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient, 0 for no bound.
        spent: Seconds and processor seconds of the stage before this loop, over all its runs: checkpoints keep them.
    """

    steps: int
    batch_size: int
    schedule: Callable[[float], float]
    seed: int
    precision: str
    checkpoint: Path
    checkpoint_seconds: float = 30.0
    weight_decay: float = 0.0
    clip: float = 0.0
    spent: tuple[float, float] = (0.0, 0.0)


@dataclass
class LoopResult:
    """Figures of a finished loop.

    Attributes:
        seconds: Training time over all runs of the stage, by the clock.
        cpu_seconds: The same, of all processors.
        earlier: Seconds and processor seconds of the stage's runs before this one, which were killed.
        tokens: Tokens seen.
        figures: The last step's figures.
        history: `[step, loss]` pairs, at most a hundred.
    """

    seconds: float
    tokens: int
    figures: dict[str, float]
    history: list[list[float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    earlier: tuple[float, float] = (0.0, 0.0)


def accelerator_for(device: str, precision: str) -> Accelerator:
    """Make the accelerator: mixed precision, and the global batch split over processes."""
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def train(
    objective: Objective, windows: torch.Tensor, settings: LoopSettings, progress: Progress, accelerator: Accelerator
) -> LoopResult:
    """Train an objective's parameters, from its checkpoint if there is one.

    Args:
        objective: Model with loss.
        windows: int64 [windows, length].
        settings: Steps, batch, schedule, checkpoint.
        progress: Told after every step.
        accelerator: From `accelerator_for`.
    """
    groups = objective.trainable()
    names = {f"{g}.{name}": p for g, group in enumerate(groups) for name, p in group["params"].items()}
    adam = MasterAdamW(
        [{"params": list(g["params"].values()), "lr": g["lr"], "initial_lr": g["lr"]} for g in groups],
        settings.weight_decay,
    )
    first, before = _restore(settings.checkpoint, names, adam)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: settings.schedule(step / settings.steps), last_epoch=first - 1
    )
    loader = accelerator.prepare_data_loader(_loader(windows, settings))
    learning = [adam.master(parameter) for parameter in names.values()]
    # Processes share what learns and nothing else: DistributedDataParallel would give each a copy of the mapped base.
    several = accelerator.num_processes > 1
    if several:
        same_weights(learning)
        for parameter, weight in zip(names.values(), learning, strict=True):
            adam.set_weight(parameter, weight)
    batches = accelerator.skip_first_batches(loader, first) if first else loader
    objective.train()
    tokens_a_step = settings.batch_size * windows.shape[1]
    started = saved = time.monotonic()
    worked = time.process_time()
    figures: dict[str, float] = dict(before.figures)
    for step, (batch,) in enumerate(batches, start=first):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        with accelerator.autocast():
            loss, shown = objective(batch, step)
        if not bool(torch.isfinite(loss)):
            raise IrcError(f"the loss is {loss.item()} at step {step}; lower the learning rate of this stage")
        accelerator.backward(loss)
        adam.take_gradients()
        if several:
            average_gradients(learning)
        if settings.clip:
            nn.utils.clip_grad_norm_(learning, settings.clip)
        adam.step()
        scheduler.step()
        adam.zero_grad()
        figures = {"loss": loss.item(), **shown}
        now = time.monotonic()
        progress.update(step + 1, **figures, tokens_per_s=(step + 1 - first) * tokens_a_step / (now - started))
        if (step + 1) % max(1, settings.steps // 100) == 0:
            before.history.append([step + 1, figures["loss"]])
        if now - saved >= settings.checkpoint_seconds and accelerator.is_main_process:
            cpu = before.cpu_seconds + time.process_time() - worked
            spent = before.earlier if first else settings.spent
            state = LoopResult(before.seconds + now - started, 0, figures, before.history, cpu, spent)
            _save(settings.checkpoint, names, adam, step + 1, state)
            saved = now
    objective.eval()
    seconds = before.seconds + time.monotonic() - started
    cpu = before.cpu_seconds + time.process_time() - worked
    earlier = (before.earlier[0] + before.seconds, before.earlier[1] + before.cpu_seconds)
    return LoopResult(seconds, settings.steps * tokens_a_step, figures, before.history, cpu, earlier)


def _loader(windows: torch.Tensor, settings: LoopSettings) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    dataset = TensorDataset(windows)
    total = settings.steps * settings.batch_size
    sampler = RandomSampler(dataset, num_samples=total, generator=generator)
    return DataLoader(dataset, batch_size=settings.batch_size, sampler=sampler)


def step_noise(units: Sequence[str], seed: int, step: int, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Draw the uniform noise of one step, the same whatever the number of processes.

    Args:
        units: Names of the units.
        seed: Of the run.
        step: Of the loop.
        shape: This process's (batch, tokens); its rows of the global draw are returned.
    """
    from accelerate.state import PartialState

    state = PartialState()
    rows, tokens = shape
    generator = torch.Generator().manual_seed((seed + 1) * 7_368_787 + step)
    draws = torch.rand(len(units), rows * state.num_processes, tokens, generator=generator)
    start = rows * state.process_index
    return {unit: draws[index, start : start + rows] for index, unit in enumerate(units)}


def _save(path: Path, names: Mapping[str, nn.Parameter], adam: MasterAdamW, step: int, state: LoopResult) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in names.items():
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
        "spent": state.earlier,
    }
    write_safetensors(path, tensors, {"irc": json.dumps(facts)})


def _restore(path: Path, names: Mapping[str, nn.Parameter], adam: MasterAdamW) -> tuple[int, LoopResult]:
    if not path.is_file():
        return 0, LoopResult(0.0, 0, {})
    try:
        with safe_open(path, framework="pt") as opened:
            facts = json.loads(opened.metadata()["irc"])
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - no mapping
        seconds, spent = facts["seconds"], tuple(facts.get("spent", (0.0, 0.0)))
        before = LoopResult(seconds, 0, facts["figures"], facts["history"], facts.get("cpu_seconds", 0.0), spent)
        for name, parameter in names.items():
            if tensors[f"weight/{name}"].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
    except Exception as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); start over with --force") from error
    for name, parameter in names.items():
        adam.set_weight(parameter, tensors[f"weight/{name}"])
        weight = adam.master(parameter)
        kept = {key.split("/", 1)[0]: tensor for key, tensor in tensors.items() if key.split("/", 1)[1] == name}
        adam.state[weight] = {
            key: tensor if key == "step" else tensor.to(weight) for key, tensor in kept.items() if key != "weight"
        }
    return facts["step"], before
