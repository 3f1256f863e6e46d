"""The graph that skips gives the logits, caches and routes of the graph that computes both branches, for less work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from irc.bundle.key_policy import KeyPolicy, set_key_policy
from irc.model.build import build_routed
from irc.model.cache import CACHE_NAME
from irc.model.modules import Record, Router
from irc.model.policies import StaticRouter
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.recipe.stages import LoraRecipe
from irc.training.lora import adapters_off, inject_lora, lora_parameters, merge_lora

Model = RoutedForCausalLM
Make = Callable[..., Model]


@contextmanager
def both_branches(model: Model) -> Iterator[None]:
    """Compute both branches, as with hooks that gather weights."""
    model.sharded = True
    try:
        yield
    finally:
        model.sharded = False


def run(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Record]]:
    """Return what a model returns, and its records; a cache that is given stays as it is."""
    kwargs = copy.deepcopy(kwargs)
    tape: dict[str, Record] = {}
    with torch.no_grad(), model.control.using(tape=tape):
        return model(*args, **kwargs), tape


def assert_same(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Record]]:
    """Compare both graphs on an input: 1e-5 on logits of about 5 (fp32), equal routes; return what skips."""
    with both_branches(model):
        expected, routes = run(model, *args, **kwargs)
    found, tape = run(model, *args, **kwargs)
    assert list(tape) == list(routes)
    for name, record in tape.items():
        assert torch.equal(record.execute, routes[name].execute)
        torch.testing.assert_close(record.difference, routes[name].difference, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    for one, other in zip(found[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        for here, there in ((one.keys, other.keys), (one.values, other.values)):  # with adapters, values reach 47
            atol = 1e-6 * max(10.0, there.abs().amax().item())  # products of fewer rows add up in another order
            torch.testing.assert_close(here, there, rtol=1e-5, atol=atol)
    return found, tape


def _static(make_routed: Make) -> Model:
    model = make_routed(policy="static", sparsity=0.5)
    for index, unit in enumerate(model.units):
        router = model.part(unit, "router")
        assert isinstance(router, StaticRouter)
        router.choose(index % 3 != 0)
    return model


def _reduced(model: Model) -> Model:
    set_key_policy(model, KeyPolicy("reduced", 0.1), dict.fromkeys((unit.name for unit in model.units), 0.5))
    assert model.control.reduced
    return model


@pytest.fixture
def kinds(make_routed: Make, shake: Any, lora_on: Any, base: Any) -> dict[str, Callable[[], Model]]:
    return {
        "linear": lambda: shake(make_routed()),
        "silu": lambda: shake(make_routed(forecaster="silu")),
        "ranks": lambda: shake(build_routed(base, RoutingSpec(4, ffn_rank=9), "fp32")),
        "bottleneck": lambda: shake(build_routed(base, RoutingSpec(16, reads="bottleneck"), "fp32")),
        "skipgpt": lambda: shake(make_routed(policy="skipgpt")),
        "random": lambda: make_routed(policy="random", sparsity=0.5),
        "mod": lambda: shake(make_routed(policy="mod", sparsity=0.5)),
        "static": lambda: _static(make_routed),
        "adapters": lambda: lora_on(shake(make_routed())),
        "reduced": lambda: _reduced(shake(make_routed())),
        "reduced, adapters": lambda: lora_on(_reduced(shake(make_routed()))),
    }


KINDS = [*"linear silu ranks bottleneck skipgpt random mod static adapters reduced".split(), "reduced, adapters"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_routes_are_those_of_both_branches(
    kinds: dict[str, Callable[[], Model]], ids: torch.Tensor, kind: str
) -> None:
    """Without padding, with padding, one sequence, and two steps of single tokens for each."""
    model = kinds[kind]()
    padded = torch.ones_like(ids)
    padded[1, :6] = 0
    for given, mask in ((ids, None), (ids, padded), (ids[:1], None)):
        found, tape = assert_same(model, given, mask)
        shares = [record.execute.float().mean() for record in tape.values()]
        assert min(shares) < 1
        assert max(shares) > 0
        for step in range(0 if kind == "mod" else 2):
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
            found, _ = assert_same(
                model, given[:, step : step + 1], mask, past_key_values=found[CACHE_NAME], logits_to_keep=1
            )
    with torch.no_grad():
        states = model.states(ids)
        with both_branches(model):
            torch.testing.assert_close(states, model.states(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_forced_routes(kinds: dict[str, Callable[[], Model]], ids: torch.Tensor, share: float) -> None:
    model = kinds["linear"]()
    masks = {unit.name: torch.rand(ids.shape) < share for unit in model.units}
    with model.control.using(mode="forced", masks=masks):
        _, tape = assert_same(model, ids)
    assert all(torch.equal(record.execute, masks[name]) for name, record in tape.items())


def test_each_module_sees_only_its_tokens(kinds: dict[str, Callable[[], Model]], ids: torch.Tensor) -> None:
    model = kinds["linear"]()
    seen: dict[str, int] = {}
    for unit in model.units:
        last = "o_proj" if unit.kind == "attention" else "down_proj"
        for name in (f"{unit.name}.{last}", f"{unit.name}_forecaster.down"):
            linear = model.graph.get_submodule(name)
            linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))
    _, tape = run(model, ids)
    for unit in model.units:
        last = "o_proj" if unit.kind == "attention" else "down_proj"
        executed = int(tape[unit.name].execute.sum())
        assert 0 < executed < ids.numel()
        assert seen[f"{unit.name}.{last}"] == executed
        assert seen[f"{unit.name}_forecaster.down"] == ids.numel() - executed
    seen.clear()
    _, tape = run(model, ids[:1, :1])
    called = [name for name, rows in seen.items() if rows]
    assert called == [
        f"{unit.name}_forecaster.down"
        if not tape[unit.name].execute.item()
        else f"{unit.name}.{'o_proj' if unit.kind == 'attention' else 'down_proj'}"
        for unit in model.units
    ]


def test_weights_are_shared(kinds: dict[str, Callable[[], Model]], ids: torch.Tensor) -> None:
    model = kinds["linear"]()
    named = set(model.state_dict())
    run(model, ids)
    made = model._compact_graph()
    own = {id(parameter) for parameter in model.graph.parameters()}
    assert {id(parameter) for parameter in made.parameters()} == own
    assert set(model.state_dict()) == named


def _train(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)


def _shift(model: Model) -> None:
    for unit in model.units:
        router = model.part(unit, "router")
        assert isinstance(router, Router)
        router.shift(2.0)


def _adapt(model: Model) -> None:
    inject_lora(model, LoraRecipe(rank=2), 0)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.eval()


def _merge(model: Model) -> None:
    _adapt(model)
    run(model, torch.ones(1, 2, dtype=torch.int64))
    merge_lora(model)


def _move(model: Model) -> None:
    for name, parameter in list(model.graph.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.graph.get_submodule(owner), leaf, nn.Parameter(parameter.detach() * 1.1))
    model.rewritten()


CHANGES: dict[str, Callable[[Model], object]] = {
    "training": _train,
    "threshold": _shift,
    "adapters": _adapt,
    "merged adapters": _merge,
    "key policy": _reduced,
    "other parameters": _move,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_every_change_of_the_model(
    kinds: dict[str, Callable[[], Model]], ids: torch.Tensor, change: str
) -> None:
    model = kinds["linear"]()
    before = assert_same(model, ids)[0].logits
    CHANGES[change](model)
    after, _ = assert_same(model, ids)
    assert (after.logits - before).abs().max() > 1e-3
    if change == "adapters":
        with adapters_off(model):
            assert torch.equal(assert_same(model, ids)[0].logits, before)


def test_training_and_errors_of_forecasts_need_both_branches(
    kinds: dict[str, Callable[[], Model]], ids: torch.Tensor
) -> None:
    model = kinds["linear"]()
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters("forecaster").values())
    with model.control.using(measure_error=True):
        _, tape = run(model, ids)
    assert all(record.cosine is not None for record in tape.values())
    assert not model._compacted
    run(model, ids)
    assert model._compacted
