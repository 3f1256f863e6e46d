"""Opens a bundle or a plain model and evaluates it on the text that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from irc.bundle.dial import dial_round, turn_dial
from irc.bundle.key_policy import KeyPolicy, calibrated_keep, key_policy_of, set_key_policy
from irc.bundle.loading import CONFIG, RECIPE, load
from irc.devices import find_device
from irc.errors import InputError
from irc.evaluation.figures import result_metrics
from irc.evaluation.kv_sweep import kv_sweep
from irc.evaluation.perplexity import evaluate, evaluate_routed
from irc.files.untrusted import check_links
from irc.model.build import build_plain
from irc.model.checkpoint import BaseModel, find_base
from irc.model.flops import flops_ratio
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe, check_key_policy, load_recipe
from irc.text.source import Split, TextSource, load_text, pick, token_stream, windows


def open_model(
    name: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    key_policy: KeyPolicy | None = None,
    sparsity: float | None = None,
    ask_hub: bool = True,
) -> RoutedForCausalLM:
    """Open a bundle, under its own key/value policy and sparsity or others, or capture a plain model.

    Without `ask_hub`, for a name that a folder gave and not the user, nothing is downloaded.
    """
    device = find_device(device)
    if (Path(name) / CONFIG).is_file():
        check_links(Path(name))
        made_with = _saved_recipe(Path(name)).dtype  # so that its figures come out again
        model = load(name, base=base, dtype=made_with if dtype == "auto" else dtype, device=device, sparsity=sparsity)
        if key_policy:
            set_key_policy(model, key_policy, calibrated_keep(model))
        return model
    if sparsity is not None:
        raise InputError(f"{name}: a plain model skips no token, so its sparsity cannot be set; convert it first")
    if key_policy:
        raise InputError(f"{name}: a plain model skips no token, so it has no key/value policy; convert it first")
    plain = find_base(name, ask_hub=ask_hub)
    model = build_plain(plain, dtype, device)
    model.facts["base"] = plain
    return model


def run_evaluation(
    name: str,
    progress: ProgressFactory,
    *,
    data: str | None = None,
    split: str = "auto",
    tokens: int | None = None,
    base: str | None = None,
    seq_len: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    key_policy: KeyPolicy | None = None,
    kv_thresholds: Sequence[float] = (),
    sparsity: float | None = None,
    sparsities: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluate a bundle or a plain model; what is not said is as in the bundle's conversion.

    Returns:
        The JSON object of `irc eval`.
    """
    for threshold in kv_thresholds:
        check_key_policy("reduced", threshold)
    model = open_model(name, base=base, dtype=dtype, device=device, key_policy=key_policy, sparsity=sparsity)
    if sparsities and model.spec is None:
        raise InputError(f"{name}: a plain model skips no token, so its sparsity cannot be set; convert it first")
    if kv_thresholds:
        calibrated_keep(model)  # refuses what has none before any work is done
    for share in sparsities:
        dial_round(model, share)  # likewise
    recipe = _recipe(model)
    if data is None and model.facts.get("config", {}).get("data") and recipe == Recipe():
        raise InputError(f"{name}: its {RECIPE} is missing or says nothing, so its text is not known; give --data")
    text = load_text(data or recipe.data)
    if split == "auto":
        known = model.facts.get("config", {}).get("data", {}).get("fingerprint")
        split = "heldout" if text.name == "stdlib" or text.fingerprint() == known else "all"
    stream = token_stream(_documents(text, split), _base(model).tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    length = seq_len or min(recipe.seq_len, limit or recipe.seq_len)
    if limit and length > limit:
        raise InputError(f"--seq-len is {length}, the model's context is {limit}; give at most {limit}")
    chosen = pick(windows(stream, length, text.name), recipe.eval_tokens if tokens is None else tokens)
    with progress("evaluate", len(chosen)) as bar:
        result = evaluate(model, chosen, bar)
    target = model.facts.get("config", {}).get("sparsity", {}).get("target") if model.spec else None
    figures = result_metrics(model, result, target)
    if kv_thresholds:
        figures["kv_sweep"] = kv_sweep(model, chosen, kv_thresholds, progress)
    if sparsities:  # last, for the dial stays where it is turned to
        figures["sparsity_sweep"] = [_at(model, share, chosen, progress) for share in sparsities]
    return {
        "model": name,
        "data": {
            "name": text.name,
            "fingerprint": text.fingerprint(),
            "split": split,
            "tokens": result.tokens,
            "seq_len": length,
        },
        **figures,
        "seconds": {"evaluate": round(result.seconds, 2)},
    }


def _at(model: RoutedForCausalLM, sparsity: float, text: torch.Tensor, progress: ProgressFactory) -> dict[str, Any]:
    """Return a bundle's figures with its dial at a sparsity; the dial stays there."""
    turn_dial(model, sparsity)
    set_key_policy(model, key_policy_of(model), calibrated_keep(model))
    with progress(f"sparsity {sparsity:g}", len(text)) as bar:
        perplexity, keep = evaluate_routed(model, text, bar)
    return {
        "target": sparsity,
        "realized": 1 - sum(keep.values()) / len(keep),
        "perplexity": perplexity,
        "flops_ratio": flops_ratio(model, keep, text.shape[1]),
    }


def _recipe(model: RoutedForCausalLM) -> Recipe:
    folder = model.facts.get("bundle")
    return Recipe() if folder is None else _saved_recipe(folder)


def _saved_recipe(folder: Path) -> Recipe:
    path = folder / RECIPE
    if not path.exists():
        return Recipe()
    recipe = load_recipe(path)
    try:
        recipe.check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return recipe


def _documents(text: TextSource, split: str) -> list[Any]:
    return list(text.documents) if split == "all" else text.split(cast(Split, split))


def _base(model: RoutedForCausalLM) -> BaseModel:
    base: BaseModel = model.facts["base"]
    return base
