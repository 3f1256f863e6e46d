"""The head cut off: states and logits as the whole model has them, losses and gradients part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3TextConfig, GraniteConfig, LlamaConfig

from irc.model import head
from irc.model.capture import capture
from irc.model.head import divergence, language_loss, log_probabilities, split_head
from irc.model.routed import RoutedForCausalLM

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}
VOCABULARY = 257


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        GraniteConfig(**SIZES, logits_scaling=3.0),
        Gemma3TextConfig(**SIZES, final_logit_softcapping=2.0),
    ],
    ids=lambda config: config.model_type,
)
def test_the_head_ends_where_the_logits_are(config: Any) -> None:
    captured = capture(config, torch.float32)
    body, tail = split_head(captured.graph)
    assert tail is not None
    linears = [node.target for node in body.graph.nodes if node.op == "call_module"]
    assert linears == ["model"]
    assert [node.target for node in tail.graph.nodes if node.op == "call_module"] == ["lm_head"]
    assert tail.get_submodule("lm_head") is captured.graph.get_submodule("lm_head")
    behind = len(list(tail.graph.nodes)) - 3  # placeholder, linear, output
    assert (behind > 0) == (config.model_type != "llama")


def test_states_and_head_give_the_logits(make_routed: Callable[..., RoutedForCausalLM], ids: torch.Tensor) -> None:
    model = make_routed()
    names = list(model.state_dict())
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        states = model.states(ids, mask)
        assert states.shape == (*ids.shape, model.config.hidden_size)
        assert torch.equal(model.logits(states), model(input_ids=ids, attention_mask=mask).logits)
    assert list(model.state_dict()) == names  # no parameter has got a second name


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_loss_part_by_part_is_the_loss(
    make_routed: Callable[..., RoutedForCausalLM],
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    share: float | None,
) -> None:
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", rows * VOCABULARY)
    model = make_routed()
    model.requires_grad_(False)
    targets = ids[:, 1:].flatten()
    with torch.no_grad():
        start = model.states(ids)[:, :-1].flatten(0, 1)
        teacher = None if share is None else start + 0.5 * torch.randn(start.shape)
    whole, pieces = (start.clone().requires_grad_(True) for _ in range(2))
    seen: list[int] = []

    def counted(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return model.logits(states)

    expected = plain = F.cross_entropy(model.logits(whole), targets, reduction="sum")
    if teacher is not None and share is not None:
        dense, routed = (model.logits(each).log_softmax(-1) for each in (teacher, whole))
        expected = (1 - share) * plain + share * F.kl_div(routed, dense, reduction="sum", log_target=True)
    (2 * expected).backward()
    given = () if share is None else (teacher, share)
    loss, found = language_loss(counted, VOCABULARY, pieces, targets, *given)
    (2 * loss).backward()
    assert max(seen) == min(rows, len(targets))
    assert sum(seen) == len(targets) * (1 if teacher is None else 2)
    assert whole.grad is not None
    assert pieces.grad is not None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        again = language_loss(model.logits, VOCABULARY, start, targets, *given)
    torch.testing.assert_close(again, (loss.detach(), found), rtol=1e-6, atol=1e-6)


def test_divergence_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    dense, routed = 4 * torch.randn(50, 11), 4 * torch.randn(50, 11)
    routed[7] = dense[7] + 3  # the same distribution
    reference = torch.distributions.Categorical(logits=dense.double())
    expected = torch.distributions.kl_divergence(reference, torch.distributions.Categorical(logits=routed.double()))
    found = divergence(log_probabilities(dense), log_probabilities(routed))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert found[7].item() == pytest.approx(0, abs=1e-6)


def test_small_types_give_float32_logarithms() -> None:
    logits = torch.randn(3, 11).bfloat16()
    found = log_probabilities(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.float().log_softmax(-1))
