"""Perplexity, sparsity, recoverability and FLOPs, compared with independent computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from irc.errors import IrcError
from irc.evaluation.perplexity import Evaluation, evaluate
from irc.model.build import build_plain
from irc.model.checkpoint import BaseModel
from irc.model.flops import flops_ratio, head_flops, unit_flops
from irc.model.modules import Record, Router
from irc.model.routed import RoutedForCausalLM

Make = Callable[..., RoutedForCausalLM]
WIDTH, INNER, HEADS, KV_HEADS, SIZE, VOCABULARY, RANK, ROUTER = 32, 48, 4, 2, 8, 257, 4, 8


@pytest.fixture
def model(make_routed: Make, shake: Any) -> RoutedForCausalLM:
    result: RoutedForCausalLM = shake(make_routed())
    return result


@pytest.fixture
def measure(bars: Any) -> Callable[..., Evaluation]:
    """Give `measure(model, text, mask)`."""

    def run(model: RoutedForCausalLM, text: torch.Tensor, mask: torch.Tensor | None = None) -> Evaluation:
        with bars()("evaluate", len(text)) as bar:
            return evaluate(model, text, bar, mask)

    return run


def perplexity(model: Any, rows: list[torch.Tensor]) -> float:
    """Return the perplexity of rows that are run one by one, without padding."""
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row[None], use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits[:-1].double(), row[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def routes(model: RoutedForCausalLM, rows: list[torch.Tensor]) -> dict[str, float]:
    """Count the tokens that each unit executes, running the rows one by one."""
    executed = {unit.name: 0 for unit in model.units}
    for row in rows:
        tape: dict[str, Record] = {}
        with torch.no_grad(), model.control.using(mode="route", tape=tape):
            model(input_ids=row[None], use_cache=False)
        for name, record in tape.items():
            executed[name] += int(record.execute.sum())
    return {name: count / sum(map(len, rows)) for name, count in executed.items()}


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    text, mask = torch.full((len(rows), length), 256), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        text[index, place], mask[index, place] = row, 1
    return text, mask


def test_dense_perplexity_is_the_eager_models(
    model: RoutedForCausalLM, base: BaseModel, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    eager = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = perplexity(eager, list(ids))
    found = measure(model, ids)
    assert found.dense == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 4 * 15
    plain = build_plain(base, "fp32")
    assert measure(plain, ids).dense == pytest.approx(expected, rel=1e-5)
    assert measure(plain, ids).routed is None


def fidelity(dense: Any, routed: Any, rows: list[torch.Tensor]) -> tuple[float, float]:
    """Return mean KL(dense || routed) and the share of equal likeliest tokens, row by row."""
    divergences, same = [], []
    with torch.no_grad():
        for row in rows:
            one, other = (model(input_ids=row[None], use_cache=False).logits[0, :-1] for model in (dense, routed))
            reference = torch.distributions.Categorical(logits=one.double())
            divergences.append(
                torch.distributions.kl_divergence(reference, torch.distributions.Categorical(logits=other.double()))
            )
            same.append(one.argmax(-1) == other.argmax(-1))
    return torch.cat(divergences).mean().item(), torch.cat(same).double().mean().item()


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_fidelity_is_to_the_dense_model(
    model: RoutedForCausalLM,
    base: BaseModel,
    ids: torch.Tensor,
    measure: Callable[..., Evaluation],
    side: str | None,
) -> None:
    rows = list(ids) if side is None else [ids[0], ids[1, :9], ids[2, :5]]
    found = (measure(model, ids) if side is None else measure(model, *padded(rows, side))).fidelity
    kl, top1 = fidelity(build_plain(base, "fp32"), model, rows)
    assert found is not None
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1 == pytest.approx(top1)
    assert found.kl > 1e-3
    assert found.kl_p99_interval[0] <= found.kl_p99 <= found.kl_p99_interval[1]


def test_with_lora_fidelity_is_to_the_base_without_it(
    make_routed: Make, lora_on: Any, base: BaseModel, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    adapted = lora_on(make_routed())
    found = measure(adapted, ids).fidelity
    assert found is not None
    assert found.kl == pytest.approx(fidelity(build_plain(base, "fp32"), adapted, list(ids))[0], rel=1e-3)


def test_a_model_that_executes_everything_is_the_dense_model(
    make_routed: Make, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    model = make_routed()
    for unit in model.units:
        cast(Router, model.part(unit, "router")).shift(100.0)
    found = measure(model, ids).fidelity
    assert found is not None
    assert (found.kl, found.kl_p99, found.top1) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6), 1.0)


def test_routed_figures_are_those_of_rows_alone(
    model: RoutedForCausalLM, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    found = measure(model, ids)
    assert found.routed == pytest.approx(perplexity(model, list(ids)), rel=1e-5)
    assert abs(found.routed - found.dense) > 0.1
    assert found.keep == pytest.approx(routes(model, list(ids)), abs=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_figure(
    model: RoutedForCausalLM, ids: torch.Tensor, measure: Callable[..., Evaluation], side: str
) -> None:
    rows = [ids[0], ids[1, :9], ids[2, :4], ids[3, :13]]
    found = measure(model, *padded(rows, side))
    assert found.tokens == sum(len(row) - 1 for row in rows)
    assert found.routed == pytest.approx(perplexity(model, rows), rel=1e-5)
    with model.control.using(mode="execute"):
        assert found.keep == pytest.approx(routes(model, rows), abs=1e-12)
    alone = [measure(model, row[None]) for row in rows]
    for unit in model.units:
        cosine = sum(one.recoverability[unit.name] * len(row) for one, row in zip(alone, rows, strict=True))
        assert found.recoverability[unit.name] == pytest.approx(cosine / sum(map(len, rows)), abs=1e-5)
    dense = sum(math.log(one.dense) * one.tokens for one in alone) / found.tokens
    assert math.log(found.dense) == pytest.approx(dense, abs=1e-5)
    unmasked = measure(model, padded(rows, side)[0])
    assert abs(unmasked.dense - found.dense) > 1e-3  # the padding makes a difference


def test_many_batches_equal_one(
    model: RoutedForCausalLM,
    ids: torch.Tensor,
    measure: Callable[..., Evaluation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = measure(model, ids)
    monkeypatch.setattr("irc.evaluation.perplexity._BATCH_TOKENS", 3 * 16)
    pieces = measure(model, ids)
    assert (pieces.dense, pieces.routed) == pytest.approx((whole.dense, whole.routed), rel=1e-6)
    assert pieces.keep == whole.keep


def test_sparsity_counts_units_equally_and_by_kind(
    model: RoutedForCausalLM, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    """Routers whose last bias alone decides: the first attention unit and the last FFN unit skip everything."""
    skipping = {model.units[0].name, model.units[3].name}
    assert [unit.kind for unit in model.units] == ["attention", "ffn"] * 2
    with torch.no_grad():
        for unit in model.units:
            last = model.part(unit, "router")[2]  # type: ignore[index]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([-1.0, 1.0] if unit.name in skipping else [1.0, -1.0]))
    found = measure(model, ids)
    assert found.keep == {unit.name: 0.0 if unit.name in skipping else 1.0 for unit in model.units}
    assert (found.sparsity(model), found.sparsity(model, "attention"), found.sparsity(model, "ffn")) == (0.5, 0.5, 0.5)
    masks = {unit.name: torch.full((4, 16), unit.name not in skipping) for unit in model.units}
    with model.control.using(mode="forced", masks=masks), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.routed == pytest.approx(math.exp(expected), rel=1e-5)


def test_recoverability_is_the_cosine_on_dense_states(
    model: RoutedForCausalLM, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    tape: dict[str, Record] = {}
    with torch.no_grad(), model.control.using(mode="execute", tape=tape, measure_error=True):
        model(input_ids=ids, use_cache=False)
    found = measure(model, ids).recoverability
    assert found == pytest.approx({name: record.cosine.mean().item() for name, record in tape.items()}, abs=1e-6)  # type: ignore[union-attr]


def test_flops_by_hand(model: RoutedForCausalLM) -> None:
    context = 15
    keys_values = 2 * (2 * WIDTH * KV_HEADS * SIZE)
    query_output = 2 * (2 * WIDTH * WIDTH)
    scores = 2 * 2 * WIDTH * (context + 1) / 2  # q.k and p.v for all heads, over 8 keys on average
    feed_forward = 3 * 2 * WIDTH * INNER
    forecaster, router = 2 * (2 * WIDTH * RANK), 2 * WIDTH * ROUTER + 2 * ROUTER * 2
    head = 2 * WIDTH * VOCABULARY
    assert head_flops(model) == head
    counts = unit_flops(model, context)
    for unit in model.units:
        count = counts[unit.name]
        expected = (keys_values, query_output, scores) if unit.kind == "attention" else (0, feed_forward, 0)
        assert (count.always, count.gated, count.scores) == expected
        assert (count.router, count.forecaster, count.reduced) == (router, forecaster, False)
    keep = dict(zip([unit.name for unit in model.units], (0.5, 0.25, 1.0, 0.0), strict=True))
    dense = 2 * (keys_values + query_output + scores + feed_forward) + head
    routed = (
        2 * keys_values
        + 1.5 * (query_output + scores)
        + 0.25 * feed_forward
        + 4 * router
        + (0.5 + 0.75 + 1) * forecaster
        + head
    )
    assert flops_ratio(model, keep, context) == pytest.approx(routed / dense, rel=1e-12)


def test_flops_of_a_plain_model_and_with_lora(base: BaseModel, make_routed: Make, lora_on: Any) -> None:
    plain = build_plain(base, "fp32")
    keep = {unit.name: 1.0 for unit in plain.units}
    assert flops_ratio(plain, keep, 16) == 1.0
    model = make_routed()
    before = flops_ratio(model, keep, 16)
    assert before > 1.0  # the cost of the routers is included
    assert flops_ratio(lora_on(model), keep, 16) == before  # adapters merge into their linears


def test_dense_perplexity_is_that_of_the_base_without_adapters(
    model: RoutedForCausalLM, lora_on: Any, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    before = measure(model, ids)
    after = measure(lora_on(model), ids)
    assert after.dense == pytest.approx(before.dense, rel=1e-6)
    assert after.routed != pytest.approx(before.routed, rel=1e-3)
    assert after.recoverability != before.recoverability  # measured on the units with their adapters


def test_a_loss_that_is_not_finite_is_no_perplexity(
    model: RoutedForCausalLM, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    with torch.no_grad():
        model.graph.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 3] = math.nan
    with pytest.raises(IrcError, match=r"model.*nan in fp32"):
        measure(model, ids)


def test_a_loss_that_is_not_finite_in_fp16_recommends_another_type(
    base: BaseModel, ids: torch.Tensor, measure: Callable[..., Evaluation]
) -> None:
    model = build_plain(base, "fp16", "cpu")
    with torch.no_grad():
        model.graph.get_parameter("model.norm.weight").fill_(6e4)
    with pytest.raises(IrcError, match=r"(nan|inf) in fp16.*bf16") as caught:
        measure(model, ids)
    assert caught.value.options == ("dtype",)
