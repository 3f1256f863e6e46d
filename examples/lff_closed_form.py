"""Fit the forecasters in closed form and by 2,000 AdamW steps per unit, and compare time and cosine.

    python examples/lff_closed_form.py [MODEL] [--data TEXT]

The first table compares the `lff` stage of `irc convert` (streaming statistics, closed form, refinement) with AdamW
from random weights at several batch sizes. As in the paper, AdamW trains on features that are extracted once and kept
in memory. The second table shows several ranks. Cosines are means over all units on held-out text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from irc import console
from irc.conversion.pipeline import fit_to_base, resolve
from irc.evaluation.perplexity import evaluate
from irc.model.build import build_routed
from irc.model.checkpoint import find_base
from irc.model.modules import Forecaster, forecast_error
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.recipe.recipe import Recipe
from irc.text.source import load_text, pick, token_stream, windows
from irc.training.stages import StageContext, cosine_schedule, run_lff

STEPS, LR = 2_000, 1e-3


def heldout_cosine(model: RoutedForCausalLM, heldout: torch.Tensor) -> float:
    """Return the mean recoverability over all units."""
    with console.progress("held-out cosine", len(heldout)) as progress:
        found = evaluate(model, heldout, progress).recoverability
    return sum(found.values()) / len(found)


@torch.no_grad()
def extract_features(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Run the dense model once; return the inputs and outputs of every unit, each [tokens, d]."""
    inputs: dict[str, list[torch.Tensor]] = {unit.name: [] for unit in model.units}
    outputs: dict[str, list[torch.Tensor]] = {unit.name: [] for unit in model.units}
    handles = []
    for unit in model.units:
        for role, store in (("forecaster", inputs), ("mux", outputs)):
            keep = store[unit.name]
            handles.append(
                model.part(unit, role).register_forward_pre_hook(
                    lambda _, arguments, keep=keep: keep.append(arguments[0].flatten(0, 1).float())
                )
            )
    with model.control.using(mode="execute"), torch.autocast("cpu", torch.bfloat16):
        for batch in text.split(16):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(inputs[name]), torch.cat(outputs[name])) for name in inputs}


def fit_by_adamw(forecaster: Forecaster, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int) -> None:
    """Train one forecaster from random weights on L1 + (1 - cosine), with a number of tokens per batch."""
    for layer in (forecaster.down, forecaster.up):
        nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
        nn.init.zeros_(layer.bias)
    forecaster.requires_grad_(True)
    optimizer = torch.optim.AdamW(forecaster.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(0.0)(step / steps))
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,))
        l1, cosine = forecast_error(forecaster(x[rows]), y[rows])
        (l1 + 1 - cosine).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    forecaster.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=STEPS, help="AdamW steps per unit")
    parser.add_argument("--batches", type=int, nargs="*", default=[128, 512, 2_048], help="tokens per AdamW step")
    parser.add_argument("--ranks", type=int, nargs="*", default=[10, 25, 50, 100, 200])
    arguments = parser.parse_args()
    recipe = resolve(Recipe(model=arguments.model, data=arguments.data))
    base = find_base(recipe.model)
    fit_to_base(recipe, base)
    text = load_text(recipe.data)
    train, calibration, heldout = (
        token_stream(text.split(s), base.tokenizer) for s in ("train", "calibration", "heldout")
    )
    heldout_windows = pick(windows(heldout, recipe.window), 32_768)

    def fitted(rank: int, name: str, **changes: int) -> tuple[RoutedForCausalLM, float]:
        """Run the lff stage at a rank; return the model and the seconds taken."""
        model = build_routed(base, RoutingSpec(rank), seed=recipe.seed)
        for key, value in changes.items():
            setattr(recipe.lff, key, value)
        with tempfile.TemporaryDirectory() as work:
            context = StageContext(model, recipe, train, calibration, Path(work), console.progress)
            started = time.monotonic()
            run_lff(context)
            return model, time.monotonic() - started

    steps = recipe.lff.steps
    rows = []
    model, closed_seconds = fitted(recipe.rank, "closed form", steps=0)
    rows.append(["closed form only", closed_seconds, heldout_cosine(model, heldout_windows)])
    model, stage_seconds = fitted(recipe.rank, "lff", steps=steps)
    rows.append([f"lff stage (closed form + {steps} steps)", stage_seconds, heldout_cosine(model, heldout_windows)])
    started = time.monotonic()
    features = extract_features(model, pick(windows(train, recipe.window), recipe.lff.tokens))
    extraction = time.monotonic() - started
    for batch in arguments.batches:
        started = time.monotonic()
        torch.manual_seed(recipe.seed)
        with console.progress(f"AdamW, {batch} tokens per step", len(model.units)) as progress:
            for done, unit in enumerate(model.units, start=1):
                fit_by_adamw(model.part(unit, "forecaster"), *features[unit.name], arguments.steps, batch)
                progress.update(done)
        seconds = extraction + time.monotonic() - started
        name = f"AdamW, {arguments.steps:,} steps per unit of {batch:,} tokens"
        rows.append([name, seconds, heldout_cosine(model, heldout_windows)])
    stage = rows[1][1]
    console.table(
        f"{recipe.model}, rank {recipe.rank} of all units, {recipe.lff.tokens:,} tokens",
        ["fit", "seconds", "time over lff", "held-out cosine"],
        [[name, f"{seconds:.1f}", f"{seconds / stage:.1f}x", f"{cosine:.4f}"] for name, seconds, cosine in rows],
    )
    sweep = []
    for rank in [rank for rank in arguments.ranks if rank <= base.config.hidden_size]:
        model, seconds = fitted(rank, "sweep", steps=steps)
        with console.progress(f"rank {rank}", len(heldout_windows)) as progress:
            found = evaluate(model, heldout_windows, progress)
        by_kind = {k: [found.recoverability[u.name] for u in model.units if u.kind == k] for k in ("attention", "ffn")}
        means = [sum(values) / len(values) for values in by_kind.values()]
        sweep.append([str(rank), f"{seconds:.1f}", *(f"{mean:.4f}" for mean in means), f"{sum(means) / 2:.4f}"])
    console.table("rank sweep (lff stage)", ["rank", "seconds", "attention", "FFN", "all units"], sweep)


if __name__ == "__main__":
    main()
