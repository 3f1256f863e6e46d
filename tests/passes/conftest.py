"""Inserted modules and golden texts for the tests of passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from irc.model.modules import Forecaster, Mux, Router, RoutingControl
from passes.insert_forecasters import InsertForecasters
from passes.insert_routers import InsertRouters


@pytest.fixture
def control() -> RoutingControl:
    return RoutingControl()


@pytest.fixture
def insertions(control: RoutingControl) -> tuple[InsertForecasters, InsertRouters]:
    """Both insertion passes; forecasters of rank 4 and routers of width 8, all muxes under `control`."""
    forecasters = InsertForecasters(lambda unit: Forecaster(unit.width, 4), lambda unit: Mux(unit.name, control))
    return forecasters, InsertRouters(lambda unit: Router(unit.width, 8))


@pytest.fixture
def golden() -> Callable[[str], str]:
    """Give `golden(name)`: the text of a file in `golden/`."""
    return lambda name: (Path(__file__).parent / "golden" / f"{name}.txt").read_text()


@pytest.fixture
def calls() -> Callable[[nn.Module], Counter[str]]:
    """Give `calls(model)`: how often each operator and each kind of inserted module is called."""

    def count(model: nn.Module) -> Counter[str]:
        found: Counter[str] = Counter()
        for module in model.modules():
            if isinstance(graph := getattr(module, "graph", None), fx.Graph):
                for node in graph.nodes:
                    if node.op == "call_module":
                        found[str(node.target).rpartition("_")[2]] += 1
                    elif isinstance(node.target, torch._ops.OpOverload):
                        found[node.target.overloadpacket.__name__] += 1
        return found

    return count
