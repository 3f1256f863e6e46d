from __future__ import annotations

import pytest
import torch
from torch import nn

from irc.training.master_weights import MasterAdamW

LR, STEPS = 1e-4, 50


def train(dtype: torch.dtype, kind: type[torch.optim.Optimizer]) -> nn.Parameter:
    """Descend from ones by a gradient of ones, in steps below the spacing of bfloat16 there (2^-8)."""
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = kind([{"params": [parameter], "lr": LR}], weight_decay=0.0)  # type: ignore[call-arg]
    for _ in range(STEPS):
        parameter.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert parameter.grad is None
    return parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_of_16_bit_parameters_add_up(dtype: torch.dtype) -> None:
    exact = train(torch.float32, torch.optim.AdamW)
    assert exact[0].item() == pytest.approx(1 - LR * STEPS, rel=1e-4)
    assert torch.equal(train(dtype, MasterAdamW), exact.to(dtype))


def test_without_copies_they_are_lost() -> None:
    assert torch.equal(train(torch.bfloat16, torch.optim.AdamW), torch.ones(3, dtype=torch.bfloat16))


def test_float32_parameters_are_their_own_copies() -> None:
    exact = train(torch.float32, torch.optim.AdamW)
    assert torch.equal(train(torch.float32, MasterAdamW), exact)
    parameter = nn.Parameter(torch.ones(3))
    assert MasterAdamW([{"params": [parameter], "lr": LR}], 0.0).master(parameter) is parameter


def test_a_parameter_without_gradient_stays() -> None:
    moving, still = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterAdamW([{"params": [moving, still], "lr": 0.1}], weight_decay=0.5)
    moving.sum().backward()
    optimizer.step()
    assert torch.equal(still, torch.ones_like(still))
    assert not torch.equal(moving, torch.ones_like(moving))


def test_a_weight_that_is_set_keeps_its_digits() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [parameter], "lr": 0.1}], 0.0)
    optimizer.set_weight(parameter, torch.tensor([1.001]))
    assert optimizer.master(parameter).item() == pytest.approx(1.001)
    assert parameter.item() == 1.0


def test_a_closure_is_refused() -> None:
    optimizer = MasterAdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}], 0.0)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)
