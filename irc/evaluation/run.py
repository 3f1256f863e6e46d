"""Evaluates a bundle or a plain model on text, for `irc eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from irc.bundle.config import EvaluationText
from irc.bundle.contents import Bundle, bundle_of
from irc.bundle.dial import check_dial, turn_dial
from irc.bundle.key_policy import calibrated_keep, set_key_policy
from irc.bundle.layout import RECIPE
from irc.bundle.loading import open_model
from irc.bundle.source import ModelSource, as_source
from irc.errors import InputError
from irc.evaluation.figures import result_metrics
from irc.evaluation.kv_sweep import kv_sweep
from irc.evaluation.perplexity import evaluate
from irc.evaluation.texts import NamedText, further_texts, measure_texts
from irc.model.own_text import texts_of
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe, check_key_policy
from irc.recipe.target import Target
from irc.text.mixture import Mixture
from irc.text.source import OWN_TEXT, Split, pick, windows


@dataclass(frozen=True)
class TextChoice:
    """Which text to read, and how much of it. None means the same as in the bundle's conversion.

    Attributes:
        data: A text, as `irc.text.source.load_text` takes it.
        split: A split of the text, `all`, or `auto`. `auto` is `heldout` for the text of the conversion, stdlib and
            self, and `all` for any other text.
        tokens: Tokens to read, spread evenly; 0 for all.
        seq_len: Tokens per window.
        yardstick_tokens: Tokens to read of each further text; 0 leaves the yardstick out.
        also: Further texts, each `NAME=TEXT`.
    """

    data: str | None = None
    split: str = "auto"
    tokens: int | None = None
    seq_len: int | None = None
    yardstick_tokens: int | None = None
    also: tuple[str, ...] = ()


def run_evaluation(
    model: ModelSource | str,
    progress: ProgressFactory,
    choice: TextChoice = TextChoice(),
    *,
    kv_thresholds: Sequence[float] = (),
    sparsities: Sequence[float] = (),
    flops_ratios: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluate a bundle or a plain model.

    Args:
        model: The model, and how to open it.
        progress: Makes progress bars.
        choice: The text to read.
        kv_thresholds: Thresholds of the key/value policy `reduced` to sweep.
        sparsities: Points of the bundle's dial to sweep.
        flops_ratios: The same for a dial that was made for FLOPs.

    Returns:
        The JSON object of `irc eval`.

    Raises:
        InputError: The model cannot be opened, the text cannot be read, or a sweep does not fit the model.
    """
    source = as_source(model)
    for threshold in kv_thresholds:
        check_key_policy("reduced", threshold)
    opened = open_model(source)
    sweeps = {
        "sparsity_sweep": [Target("sparsity", value) for value in sparsities],
        "flops_sweep": [Target("flops", value) for value in flops_ratios],
    }
    _refuse_sweeps(opened, source.name, kv_thresholds, [target for sweep in sweeps.values() for target in sweep])
    text, split, seq_len, chosen = chosen_text(opened, source.name, choice, progress)
    further = texts_beside(opened, seq_len, choice)
    with progress("evaluate", len(chosen)) as bar:
        result = evaluate(opened, chosen, bar)
    bundle = bundle_of(opened)
    figures = result_metrics(opened, result, None if bundle is None else bundle.config.measured.target)
    figures["texts"] = measure_texts(opened, further, progress)
    if kv_thresholds:
        figures["kv_sweep"] = kv_sweep(opened, chosen, kv_thresholds, progress)
    for name, targets in sweeps.items():  # last, because the dial stays where it is turned to
        if targets:
            figures[name] = [_figures_at(opened, target, chosen, progress) for target in targets]
    return {
        "model": source.name,
        "data": {
            "name": text.name,
            "fingerprint": text.fingerprint(),
            "split": split,
            "tokens": result.tokens,
            "seq_len": seq_len,
        },
        **figures,
        "seconds": {"evaluate": round(result.seconds, 2)},
    }


def _refuse_sweeps(
    model: RoutedForCausalLM, name: str, kv_thresholds: Sequence[float], targets: Sequence[Target]
) -> None:
    """Refuse sweeps that the model cannot run, before any work is done."""
    if targets and model.spec is None:
        raise InputError(f"{name}: a plain model skips no token, so it has no {targets[0].kind}; convert it first")
    if kv_thresholds:
        calibrated_keep(model)
    for target in targets:
        check_dial(model, target)


def chosen_text(
    model: RoutedForCausalLM, name: str, choice: TextChoice, progress: ProgressFactory
) -> tuple[Mixture, str, int, torch.Tensor]:
    """Choose what a model is evaluated on.

    Args:
        model: A bundle or a plain model.
        name: Its name, for errors.
        choice: What the user chose.
        progress: Makes progress bars.

    Returns:
        The text, the name of its split, tokens per window, and the windows, int64 [windows, tokens].

    Raises:
        InputError: The text cannot be read, or is not known any more.
    """
    bundle = bundle_of(model)
    recipe = Recipe() if bundle is None else bundle.recipe
    if choice.data is None and _text_is_lost(bundle, recipe):
        raise InputError(
            f"{name}: its {RECIPE} is missing or empty, so its text is not known; name a text", options=("data",)
        )
    text = texts_of(recipe, model.base, progress, str(model.device), choice.data)
    split = choice.split
    if split == "auto":
        known = None if bundle is None else bundle.config.measured.text.fingerprint
        stable = all(one.name in ("stdlib", OWN_TEXT) for one in text.texts)  # the same splits on any machine
        split = "heldout" if stable or text.fingerprint() == known else "all"
    windowed = recipe.model_copy(update={"seq_len": choice.seq_len or recipe.seq_len})
    seq_len = windowed.seq_len_for(getattr(model.config, "max_position_embeddings", None))
    stream = text.stream(None if split == "all" else cast(Split, split), model.base.tokenizer, seq_len)
    tokens = recipe.eval_tokens if choice.tokens is None else choice.tokens
    return text, split, seq_len, pick(windows(stream, seq_len, text.name), tokens)


def texts_beside(model: RoutedForCausalLM, seq_len: int, choice: TextChoice) -> list[NamedText]:
    """Return the yardstick and the user's further texts, as many tokens as the user chose or the conversion read."""
    bundle, tokens = bundle_of(model), choice.yardstick_tokens
    if tokens is None:
        tokens = (Recipe() if bundle is None else bundle.recipe).yardstick_tokens
    return further_texts(model.base, seq_len, tokens, choice.also)


def _text_is_lost(bundle: Bundle | None, recipe: Recipe) -> bool:
    """Return whether a conversion read a text and the bundle no longer says which."""
    return bundle is not None and bundle.config.measured.text != EvaluationText() and recipe == Recipe()


def _figures_at(
    model: RoutedForCausalLM, target: Target, text: torch.Tensor, progress: ProgressFactory
) -> dict[str, Any]:
    """Turn a bundle's dial to a target and return its figures. The dial stays there."""
    turn_dial(model, target)
    set_key_policy(model, model.key_policy, calibrated_keep(model))
    with progress(str(target), len(text)) as bar:
        result = evaluate(model, text, bar)
    assert result.fidelity is not None
    return {
        "target": target.value,
        "realized": result.sparsity(model),
        "perplexity": result.routed,
        "kl": result.fidelity.kl,
        "top1": result.fidelity.top1,
        "flops_ratio": result.flops_ratio,
    }
