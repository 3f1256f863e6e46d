from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from irc.experts import Experts
from passes.base import PassManager
from passes.printer import print_model
from passes.route_experts import RouteExperts

WIDTH, COUNT, EACH = 16, 5, 2


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_each_expert_computes_the_tokens_that_chose_it(captured_module: Callable, normalised: bool) -> None:
    mixture, x = Experts(WIDTH, 24, COUNT, EACH, normalised, "silu"), torch.randn(2, 7, WIDTH)
    model = captured_module(mixture, x)
    expected = mixture(x)
    assert PassManager([RouteExperts()]).run(model).modified
    met: dict[str, int] = {}
    for name in (f"experts.{i}" for i in range(COUNT)):
        hook = lambda module, args, name=name: met.update({name: args[0].shape[1]})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    found = model(x)
    torch.testing.assert_close(found[0] if isinstance(found, (list, tuple)) else found, expected, rtol=0, atol=1e-6)
    assert len(met) == COUNT
    assert sum(met.values()) == 2 * 7 * EACH  # every expert on every token would be 2 * 7 * COUNT


def test_second_run_changes_nothing(captured_module: Callable) -> None:
    model = captured_module(Experts(WIDTH, 24, COUNT, EACH, True, "silu"), torch.randn(2, 7, WIDTH))
    PassManager([RouteExperts()]).run(model)
    text = print_model(model)
    assert not PassManager([RouteExperts()]).run(model).modified
    assert print_model(model) == text
