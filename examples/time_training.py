"""Time one step of the router stage and a forward and backward pass of the dense model, in turns.

    python examples/time_training.py [--model demo] [--batch 8] [--length 256] [--rounds 7] [--profile]

The dense pass trains all weights, as in fine-tuning. "Activations only" freezes them, which is the cheapest possible
backward pass. The router stage trains forecasters, and computes both branches of every unit. All of them
run the captured graph on the same tokens. The optimizer's step is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_DENSE, _FROZEN = "dense, forward and backward", "dense, activations only"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Model folder, hub id, or demo.")
    parser.add_argument("--batch", type=int, default=8, help="Windows per step.")
    parser.add_argument("--length", type=int, default=256, help="Tokens per window.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed rounds. Medians are reported.")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--profile", action="store_true", help="Also print the router step's operators by time.")
    arguments = parser.parse_args()
    from irc import console
    from irc.conversion.pipeline import resolve
    from irc.model.build import build_plain, build_routed, default_spec
    from irc.model.checkpoint import find_base
    from irc.recipe.recipe import Recipe
    from irc.training.budget import plain_budget
    from irc.training.objectives import RoutingObjective

    base = find_base(arguments.model)
    dense = build_plain(base, "fp32").train()
    dense.requires_grad_(True)
    routed = build_routed(base, default_spec(base.config.hidden_size), "fp32").train()
    routed.requires_grad_(False)
    for parameter in routed.adapter_parameters("forecaster").values():
        parameter.requires_grad_(True)
    recipe = resolve(Recipe())
    budget = plain_budget([unit.name for unit in routed.units], arguments.sparsity)
    objective = RoutingObjective(routed, recipe.router, budget, 0, recipe.router.steps)
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(0, base.config.vocab_size, (arguments.batch, arguments.length), generator=draw)

    def plain() -> Any:
        return dense(input_ids=windows, labels=windows, use_cache=False).loss

    def router() -> Any:
        return objective(windows, 0)[0]

    def frozen() -> Any:
        dense.requires_grad_(False)
        next(dense.parameters()).requires_grad_(True)  # the embedding: gradients flow back to the first layer
        loss = plain()
        dense.requires_grad_(True)
        return loss

    losses: dict[str, Callable[[], Any]] = {_DENSE: plain, _FROZEN: frozen, "router stage": router}
    models = {_DENSE: dense, _FROZEN: dense, "router stage": routed}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for _ in range(arguments.rounds + 1):
        for name, make in losses.items():
            started = time.perf_counter()
            loss = make()
            between = time.perf_counter()
            loss.backward()
            seconds[name].append((between - started, time.perf_counter() - between))
            models[name].zero_grad(set_to_none=True)
    medians = {name: np.median(np.array(values[1:]), axis=0) for name, values in seconds.items()}
    plain_total = medians[_DENSE].sum()
    console.table(
        f"{arguments.model}, {arguments.batch} x {arguments.length} tokens, medians of {arguments.rounds}",
        ["", "forward ms", "backward ms", "total ms", "total over dense"],
        [
            [name, *(f"{1e3 * value:.0f}" for value in (*found, found.sum())), f"{found.sum() / plain_total:.3f}"]
            for name, found in medians.items()
        ],
    )
    if arguments.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            router().backward()
        console.say(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
