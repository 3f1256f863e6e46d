"""Captures a deep model from its first layers: torch.export takes about a second per layer, a copy takes milliseconds.

Most decoder layers differ in their weights alone. The capture of a model with the first few layers then contains each
kind of layer, and the graphs of the others are copies.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn
from transformers import PretrainedConfig, PreTrainedModel

from passes.base import finish, graph_of

_BODY, _LAYERS = "model", "layers"
_CALL = re.compile(rf"{_LAYERS}\.(\d+)")
_WORTH_IT = 2  # layers that need no capture
_PLAIN = (int, float, str, bool, type(None))
_POSITIONS = frozenset({"layer_idx"})


def layers_to_copy(twin: PreTrainedModel) -> list[int] | None:
    """Return which layers can be copied from which.

    Args:
        twin: The model on the meta device.

    Returns:
        For each layer the one that its graph is taken from: itself for the first few layers, which have to be captured;
        for the others one of these that differs in weights alone, but never layer 0, which reads the embedding. None if
        nothing is gained, or if the model does not keep its layers in `model.layers`.
    """
    layers = getattr(getattr(twin, _BODY, None), _LAYERS, None)
    count = twin.config.num_hidden_layers
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        return None
    kinds = [_kind(layer, twin.config, index) for index, layer in enumerate(layers)]
    first = next((k for k in range(2, count) if set(kinds[k:]) <= set(kinds[1:k])), count)
    if count - first < _WORTH_IT:
        return None
    return [*range(first), *(kinds.index(kind, 1) for kind in kinds[first:])]


def with_first_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the configuration of a model that has the first `count` layers alone."""
    small = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, value[:count])
    small.num_hidden_layers = count
    return small


def _kind(layer: nn.Module, config: PretrainedConfig, index: int) -> str:
    """Describe everything about a layer that its graph can depend on, except its position."""
    types = getattr(config, "layer_types", None)  # the model chooses a layer's mask by them
    parts: list[Any] = [types[index] if types else None]
    for name, module in layer.named_modules():
        settings = {
            key: value if isinstance(value, _PLAIN) else getattr(value, "__qualname__", type(value).__qualname__)
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _POSITIONS
        }
        tensors = {**module._parameters, **module._buffers}
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items() if tensor is not None}
        parts.append((name, type(module).__qualname__, sorted(settings.items()), sorted(shapes.items())))
    return repr(parts)


def add_copies(root: fx.GraphModule, sources: Sequence[int]) -> None:
    """Add the layers that were left out of a capture, each as a copy with weights of its own on the meta device.

    Args:
        root: Captured with the first layers alone (see `irc.model.capture.Captured`); changed in place.
        sources: As `layers_to_copy` returns them.
    """
    first = sum(index == source for index, source in enumerate(sources))
    body = root.get_submodule(_BODY)
    inner, outer = graph_of(body), root.graph
    assert inner is not None
    (body_call,) = outer.find_nodes(op="call_module", target=_BODY)
    past = [node for node in outer.find_nodes(op="placeholder") if str(node.target).startswith("past_key_values_")]
    given = cast(Sequence[fx.Node], body_call.args)
    cache_of = dict(zip(given, inner.find_nodes(op="placeholder"), strict=True))
    outputs, results = _returned(outer), _returned(inner)
    calls = {int(found[1]): node for node in inner.nodes if (found := _CALL.fullmatch(str(node.target)))}

    def parts_of(layer: int) -> list[fx.Node]:
        """Return what a captured layer gives: keys, values, and the stream."""
        stored = [results[cast(int, outputs[1 + 2 * layer + part].args[1])] for part in range(2)]
        (stream,) = (node for node in calls[layer].users if node not in stored)
        return [*stored, stream]

    stream = old_stream = place = parts_of(first - 1)[2]
    new_calls = set()
    for index in range(first, len(sources)):
        source = sources[index]
        body.get_submodule(_LAYERS).add_module(str(index), copy.deepcopy(body.get_submodule(f"{_LAYERS}.{source}")))
        replaced = {parts_of(source - 1)[2]: stream}
        for part in range(2):
            like = past[2 * source + part]
            past.append(_input_after(past[-1], f"past_key_values_{2 * index + part}", like))
            last = inner.find_nodes(op="placeholder")[-1]
            replaced[cache_of[like]] = _input_after(last, f"past_of_layer_{index}_{part}", cache_of[like])
        body_call.args = (*body_call.args, *past[-2:])
        place = call = _copied_after(place, calls[source], replaced)
        call.target = f"{_LAYERS}.{index}"
        new_calls.add(call)
        made = []
        for node in parts_of(source):
            place = _copied_after(place, node, {calls[source]: call})
            made.append(place)
        stream = made[2]
        for node in made[:2]:
            with outer.inserting_before(outer.output_node()):
                outputs.append(outer.call_function(operator.getitem, (body_call, len(results))))
            outputs[-1].meta = copy.copy(node.meta)
            results.append(node)
    old_stream.replace_all_uses_with(stream, delete_user_cb=lambda user: user not in new_calls)
    inner.output_node().args, outer.output_node().args = (results,), (tuple(outputs),)
    finish(body)
    finish(root)


def _returned(graph: fx.Graph) -> list[fx.Node]:
    return list(cast(Sequence[fx.Node], graph.output_node().args[0]))


def _input_after(node: fx.Node, name: str, like: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        made = node.graph.placeholder(name)
    made.meta = copy.copy(like.meta)
    return made


def _copied_after(place: fx.Node, node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    with place.graph.inserting_after(place):
        return place.graph.node_copy(node, lambda argument: replaced.get(argument, argument))
