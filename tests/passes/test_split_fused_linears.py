from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Phi3Config

from passes.base import PassManager
from passes.split_fused_linears import SplitFusedLinears


def test_phi3_gets_the_linears_of_a_llama(tiny_of: Callable) -> None:
    config = Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = tiny_of(config)
    ids = model.ids(2, 7)
    before = model.run(ids)
    stored = model.graph.get_submodule("model.layers.0.self_attn.qkv_proj").weight.data_ptr()
    assert PassManager([SplitFusedLinears()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    layer = model.graph.get_submodule("model.layers.0")
    linears = {name: part.out_features for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    assert linears == {
        "self_attn.o_proj": 32,
        "self_attn.q_proj": 32,
        "self_attn.k_proj": 16,
        "self_attn.v_proj": 16,
        "mlp.gate_proj": 48,
        "mlp.up_proj": 48,
        "mlp.down_proj": 32,
    }
    assert layer.get_submodule("self_attn.q_proj").weight.data_ptr() == stored, "weights are views, not copies"
    assert not PassManager([SplitFusedLinears()]).run(model.graph).modified


class Whole(nn.Module):
    """A linear that something reads whole beside a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.both(x)
        result: torch.Tensor = self.last(y) * y[..., :8] + y[..., 8:]
        return result


def test_a_linear_that_is_read_whole_stays(captured_module: Callable) -> None:
    model = captured_module(Whole(), torch.randn(2, 3, 8))
    assert not PassManager([SplitFusedLinears()]).run(model).modified
