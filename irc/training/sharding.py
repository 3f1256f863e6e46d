"""Training in several processes.

Each process holds the whole frozen base or, with FSDP2, a shard of it, and gathers each layer while computing it. The
trained weights are few (1 % of an 8B model). Each process holds all of them, and averaged gradients keep them equal,
so checkpoints and bundles are those of a single process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable

import torch

from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe
from irc.recipe.stages import STAGE_NAMES, stage_named
from irc.training.layerwise import outermost
from irc.training.processes import group, join_group

log = logging.getLogger(__name__)

_USE_FSDP, _FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"


def sharding_wanted() -> bool:
    """Return whether `accelerate launch --use_fsdp --fsdp_version 2` started this process together with others.

    Raises:
        InputError: Another version of FSDP was asked for.
    """
    if os.environ.get(_USE_FSDP, "").lower() not in ("true", "1") or group().size == 1:
        return False
    version = os.environ.get(_FSDP_VERSION, "1")
    if version != "2":
        raise InputError(f"FSDP version {version} is not supported; run accelerate launch with --fsdp_version 2")
    return True


def check_batches(recipe: Recipe, finished: Container[str] = ()) -> None:
    """Refuse batch sizes that cannot be split over the processes of this run, before any work is done.

    Args:
        recipe: Resolved recipe.
        finished: Stages that will not be trained again. Their batch sizes are not checked.

    Raises:
        InputError: A batch size is not a multiple of the number of processes.
    """
    policy = policy_named(recipe.policy)
    processes = join_group(recipe.device).num_processes
    for stage in recipe.stages:
        settings = stage_named(stage).settings_in(recipe)
        size = settings.batch_size
        if size is not None and size % processes and settings.trains(policy) and stage not in finished:
            raise InputError(
                f"{stage}.batch_size is {size}, which {processes} processes cannot share; use a multiple of {processes}"
            )


def settle_batches(recipe: Recipe) -> None:
    """Replace batch sizes of None: as many windows as make the stage's tokens per step, at least one per process.

    Args:
        recipe: Its windows are known. The stages' settings are changed in place.
    """
    processes = join_group(recipe.device).num_processes
    for name in STAGE_NAMES:
        settings = stage_named(name).settings_in(recipe)
        if settings.batch_size is None:
            settings.batch_size = max(1, settings.step_tokens // (recipe.train_window * processes)) * processes


def own_device(device: str) -> None:
    """Make `cuda` mean this process's own GPU when several processes share a machine."""
    if device == "cuda" and group().size > 1:
        torch.cuda.set_device(group().local_rank)


def shard_base(model: RoutedForCausalLM) -> None:
    """Shard the frozen weights of each decoder layer over the processes. The process group must be running.

    Embedding, head, last norm, routers and forecasters stay whole.

    Args:
        model: Rewritten model, on the CPU (mapped) or on its device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    inserted = set(model.adapter_parameters("router", "forecaster").values())
    for name in outermost({unit.block for unit in model.units}):
        block = model.graph.get_submodule(name)
        whole = {parameter for parameter in block.parameters() if parameter in inserted}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.sharded = True
    sharded = [parameter for parameter in model.graph.parameters() if isinstance(parameter, DTensor)]
    total = sum(parameter.numel() for parameter in sharded)
    local = sum(parameter.to_local().numel() for parameter in sharded)
    log.debug("the frozen weights of the layers are sharded: %d in total, %d in this process", total, local)


def broadcast_weights(weights: Iterable[torch.Tensor]) -> None:
    """Give all processes the weights of the first one, because closed forms may differ in their last bits."""
    for weight in weights:
        torch.distributed.broadcast(weight.detach(), 0)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each gradient by its mean over all processes.

    A parameter that has no gradient in any process has none afterwards either. A zero gradient would not be the same:
    the optimizer skips a weight without a gradient, but decays one whose gradient is zero.
    """
    weights = list(parameters)
    has_gradient = [weight.grad is not None for weight in weights]  # in this process; others may have one
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(has_gradient).to(gradients[0])])
    torch.distributed.all_reduce(flat)
    *sums, counts = flat.split([*(gradient.numel() for gradient in gradients), len(weights)])
    for weight, gradient, total, count in zip(weights, gradients, sums, counts.tolist(), strict=True):
        gradient.copy_(total.view_as(gradient) / torch.distributed.get_world_size())
        weight.grad = gradient if count else None
