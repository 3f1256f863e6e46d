"""The model card describes a bundle: its policy, figures and options, and how to make it again."""

from __future__ import annotations

from typing import Any

import pytest

from irc.bundle.card import model_card
from irc.conversion.pipeline import resolve
from irc.recipe.policies import policy_named
from irc.recipe.recipe import load_recipe

FIDELITY = {"kl": 0.1234, "kl_p99": 1.5, "kl_p99_interval": [1.4, 1.6], "top1": 0.875}
METRICS: dict[str, Any] = {
    "fidelity": FIDELITY,
    "texts": [
        {
            "name": "code",
            "fidelity": FIDELITY | {"kl": 0.777},
            "perplexity": {"dense": 3.0, "routed": 4.0, "ratio": 4 / 3},
            "flops_ratio": 0.71,
        }
    ],
    "perplexity": {"dense": 10.0, "routed": 10.5, "ratio": 1.05},
    "sparsity": {"target": 0.4, "realized": 0.412, "attention": 0.3, "ffn": 0.524},
    "flops_ratio": 0.7,
    "data": {"tokens": 1234, "split": "heldout"},
}


def card(*settings: str) -> str:
    given = ["model=m", "sparsity=0.4", "rank=6", "ffn_rank=12", "seq_len=256", *settings]
    return model_card(METRICS, resolve(load_recipe(None, given)))


def test_figures_are_those_of_the_metrics() -> None:
    text = card()
    for cell in ("10.000", "10.500 (1.050 x dense)", "0.400", "0.412", "0.300 / 0.524", "0.700"):
        assert f"| {cell} |" in text
    assert "| 0.123, 1.50 nats |" in text
    assert "| code | 0.777 | 0.875 | 3.00 | 4.00 | 0.710 |" in text
    assert "on 1,234 tokens of the held-out text of `stdlib` in windows of 256 tokens" in text
    assert "Make it again: `irc convert --recipe recipe.yaml -o OUTPUT` (stages lff, router, seed 0)" in text


@pytest.mark.parametrize(
    ("policy", "holds"),
    [
        ("informed", "Routers and forecasters (rank 6, of FFN units 12)"),
        ("random", "Routers and forecasters (rank 6, of FFN units 12)"),
        ("skipgpt", "Routers, without forecasters,"),
        ("static", "Routers, without forecasters,"),
    ],
)
def test_it_says_what_the_policy_puts_there(policy: str, holds: str) -> None:
    text = card(f"policy={policy}")
    assert text.startswith(f"# m, {policy} routing at 40% sparsity\n")
    assert f"{holds} around every attention and FFN unit of `m`: {policy_named(policy).summary}." in text


def test_options_are_told_where_they_are_taken() -> None:
    plain = card()
    for word in ("Other sparsities", "Keys and values", "LoRA"):
        assert word not in plain
    assert "Other sparsities, from 0.1 to 0.5" in card("dial=[0.1, 0.5]")
    assert "Other sparsities, from 0.1 to 0.4" in card("dial=[0.1, 0.2]")
    assert "Keys and values: policy `reduced`, threshold 0.7" in card("kv_policy=reduced", "kv_threshold=0.7")
    told = card("stages=[lff, router, lora]", "lora.rank=3", "lora.targets=[q_proj]")
    assert "LoRA adapters (rank 3) on q_proj are in `lora/`" in told
