"""Several processes: each holds the whole frozen base, or (FSDP2) a shard of it, each layer gathered while it computes.

What learns is small (1 % of an 8B model) and stays whole and alike in all processes, by the mean of their gradients:
checkpoints and bundles are those of one process, and hold our keys alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable

import torch
from accelerate import PartialState

from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe
from irc.training.layerwise import outermost

log = logging.getLogger(__name__)

_ON, _VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"


def sharding_wanted() -> bool:
    """Whether `accelerate launch --use_fsdp --fsdp_version 2` started this process, beside others.

    Raises:
        InputError: The version is another.
    """
    if os.environ.get(_ON, "").lower() not in ("true", "1") or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    version = os.environ.get(_VERSION, "1")
    if version != "2":
        raise InputError(f"accelerate was told --use_fsdp with version {version}; add --fsdp_version 2")
    return True


def check_batches(recipe: Recipe, finished: Container[str] = ()) -> None:
    """Refuse batches that the processes of this run cannot share, before any work is done.

    Args:
        recipe: Resolved recipe.
        finished: Stages that are not trained again; their batches do not matter.

    Raises:
        InputError: Names the field, its value and the number of processes.
    """
    policy = policy_named(recipe.policy)
    in_batches = {
        "lff": recipe.lff.steps > 0,
        "router": policy.learns or (policy.forecasts and recipe.router.forecaster_lr > 0),
        "lora": True,
    }
    processes = PartialState(cpu=recipe.device == "cpu").num_processes
    for stage in recipe.stages:
        size = getattr(recipe, stage).batch_size
        if size % processes and in_batches[stage] and stage not in finished:
            raise InputError(
                f"{stage}.batch_size is {size}, over {processes} processes; give a multiple of {processes}"
            )


def own_device(device: str) -> None:
    """Make `cuda` mean this process's own GPU where several processes share a machine."""
    place = os.environ.get("LOCAL_RANK")
    if device == "cuda" and place is not None:
        torch.cuda.set_device(int(place))


def shard_base(model: RoutedForCausalLM) -> None:
    """Leave of every decoder layer's frozen weights a shard in this process; the process group is running.

    Embedding, head and the last norm stay whole, and so do routers and forecasters.

    Args:
        model: Rewritten model, on the CPU (mapped) or on its device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    ours = set(model.adapter_parameters("router", "forecaster").values())
    for name in outermost({unit.block for unit in model.units}):
        block = model.graph.get_submodule(name)
        inside = {parameter for parameter in block.parameters() if parameter in ours}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=inside)
    whole = sum(p.numel() for p in model.graph.parameters() if isinstance(p, DTensor))
    here = sum(p.to_local().numel() for p in model.graph.parameters() if isinstance(p, DTensor))
    log.debug("the layers' %d frozen weights lie in shards, %d of them in this process", whole, here)


def same_weights(weights: Iterable[torch.Tensor]) -> None:
    """Give all processes the first one's weights: closed forms may differ in their last bits."""
    for weight in weights:
        torch.distributed.broadcast(weight.detach(), 0)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace gradients by their mean over all processes; where no process has one there is none afterwards.

    An optimizer leaves a weight without a gradient alone, but decays one whose gradient is zero.
    """
    learning = list(parameters)
    given = [parameter.grad is not None for parameter in learning]  # here; another process may have one
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(given).to(gradients[0])])
    torch.distributed.all_reduce(flat)
    *sums, holders = flat.split([*(gradient.numel() for gradient in gradients), len(learning)])
    for parameter, gradient, total, count in zip(learning, gradients, sums, holders.tolist(), strict=True):
        gradient.copy_(total.view_as(gradient) / torch.distributed.get_world_size())
        parameter.grad = gradient if count else None
