"""Captures a Hugging Face causal language model with torch.export, as one graph per submodule.

A twin of the model on the meta device is captured, with a key/value cache and dynamic batch, length and past length; it
has no weights and takes no memory. Afterwards linears replace their captured graphs, and weights are assigned without a
copy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, export, unflatten
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

from irc.errors import InputError
from irc.files.untrusted import first_line
from irc.model.architectures import SUPPORTED, TESTED
from irc.model.cache import CACHE_NAME, cache_shape
from irc.model.experts import separate_experts, stored_name
from irc.model.interrupts import interrupts_kept
from irc.model.repeated_layers import add_copies, layers_to_copy, with_first_layers
from irc.model.stored import StoredWeights
from passes.base import PassManager
from passes.clean_up import CleanUp
from passes.set_device import SetDevice
from passes.tracing import tracing

log = logging.getLogger(__name__)

_BATCH, _LENGTH, _PAST = 2, 3, 5
_CALL_NUMBER = re.compile(r"@\d+")
_NUMBERS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_WANTED = "convert a checkpoint in bfloat16, float16 or float32"
_ROPES = ("default", "linear", "yarn", "llama3")
_DYNAMIC_ROPES = ("dynamic", "longrope", "su")  # su is longrope's earlier name
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_PREFIX = "model."
_COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints contain it; it follows from the configuration


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph: `graph(input_ids, attention_mask, position_ids, *past)` returns
            `(logits, *present)`; past and present are k0, v0, k1, v1, ..., each
            [batch, key/value heads, length, head size]. Weights are on the meta device until `assign_weights`.
        config: The Hugging Face configuration.
        dtype: Data type of the capture. Another data type needs another capture.
        stored: Takes the large weights whose type is another one; None: they are converted.
    """

    graph: fx.GraphModule
    config: PretrainedConfig
    dtype: torch.dtype
    stored: StoredWeights | None = None


def capture(config: PretrainedConfig, dtype: torch.dtype) -> Captured:
    """Capture the architecture that a configuration describes, on the meta device.

    Args:
        config: Of a causal language model; batch, length and past length become dynamic.
        dtype: Data type of weights and activations.

    Raises:
        InputError: transformers cannot build the architecture, or torch.export cannot capture it.
    """
    _refuse_unsupported(config)
    sources = layers_to_copy(_meta_twin(config, dtype))
    traced = config if sources is None else with_first_layers(config, len(set(sources)))
    graph = _traced(traced, dtype)
    _check_outputs(graph, traced)
    if sources is not None:
        add_copies(graph, sources)
    PassManager([CleanUp()]).run(graph)
    return Captured(graph, config, dtype)


def _traced(config: PretrainedConfig, dtype: torch.dtype) -> fx.GraphModule:
    twin = _meta_twin(config, dtype)
    separate_experts(twin, config)
    register_cache_pytrees_for_model(twin)
    grad_mode = torch.is_grad_enabled()
    try:
        inputs, shapes = _example_inputs(config, dtype), _dynamic_shapes(config)
        with interrupts_kept(), tracing():
            program = export(twin, (), inputs, dynamic_shapes=shapes, strict=False)
            module = unflatten(program)
    except Exception as error:
        raise InputError(
            f"{config.model_type}: torch.export cannot capture the model that config.json describes "
            f"({first_line(error)}); {_remedy(config)}"
        ) from error
    finally:
        torch.set_grad_enabled(grad_mode)
    _relink(module, twin)
    return _root(module)


def assign_weights(captured: Captured, weights: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
    """Give a captured model its weights without copying them, and move its graphs to their device.

    Args:
        captured: Model on the meta device.
        weights: By name, as in the original model's state dict; tied names may be missing. A warning names weights that
            the model does not use.
        device: Where the model will run.

    Raises:
        InputError: A weight is missing, has a shape that the configuration does not imply, or differs from one that it
            is tied to.
    """
    shared: dict[str, nn.Parameter] = {}
    model = captured.graph
    tied = _tied_names(captured.config, weights)
    for name, other in tied.items():
        head, embedding = _found(name, weights), _found(other, weights)
        if head in weights and embedding in weights and not _same(weights[head], weights[embedding]):
            raise InputError(
                f"weight {name} differs from {other}, but the configuration ties them; if both are needed, set "
                "tie_word_embeddings to false in config.json"
            )
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        stored = _found(stored_name(tied.get(name, name), captured.config), weights)
        source = weights.get(stored)
        if source is None:
            raise InputError(f"weight {name} is missing from the checkpoint; {_missing(name, parameter, weights)}")
        if source.shape != parameter.shape:
            raise InputError(f"weight {name} is {list(source.shape)}, the configuration says {list(parameter.shape)}")
        if source.dtype not in _NUMBERS:
            kind = str(source.dtype).removeprefix("torch.")
            raise InputError(f"weight {name} is stored as {kind}, which needs a scale; {_WANTED}")
        if stored not in shared:
            held = captured.stored.placeholder(source, captured.dtype) if captured.stored else None
            if held is None:  # mixed-dtype checkpoints are converted; if dtype and device agree, nothing is copied
                held = source.detach().to(device, captured.dtype)
            shared[stored] = nn.Parameter(held, requires_grad=False)
        _set(model, name, shared[stored])
    _warn_about_unused(
        captured.config.model_type, weights.keys() - shared.keys() - {_found(name, weights) for name in tied}
    )
    _rebuild_buffers(captured, device)
    PassManager([SetDevice(device)]).run(model)


def _refuse_unsupported(config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *rope.values()] if isinstance(rope, dict) else []  # one for all layers, or one per kind
    for kind in (part.get("rope_type") for part in parts if isinstance(part, dict)):
        if kind is not None and kind not in _ROPES:
            dynamic = kind in _DYNAMIC_ROPES
            why = "depends on the text's length, which a graph cannot express" if dynamic else "is unknown"
            raise InputError(
                f"{config.model_type}: config.json has rope type '{kind}', which {why}; use a model with one of "
                f"{', '.join(_ROPES)}"
            )
    for key in _ACTIVATIONS:
        value = getattr(config, key, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise InputError(
                f"{config.model_type}: config.json has {key} '{value[:40]}', which transformers does not know; "
                "correct it"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{config.model_type}: encoder-decoder models are not supported; convert a decoder-only model")


def _meta_twin(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            twin: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        raise InputError(
            f"{config.model_type}: transformers cannot build the model that config.json describes "
            f"({first_line(error)}); {_remedy(config)}"
        ) from error
    twin.train(False)
    model: PreTrainedModel = twin
    return model


def _remedy(config: PretrainedConfig) -> str:
    return "correct config.json" if config.model_type in TESTED else f"convert {SUPPORTED}"


def _example_inputs(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    layers, heads, size = cache_shape(config)
    meta: dict[str, Any] = {"device": "meta"}
    # Plain layers, whatever the configuration says: sliding layers keep their whole past, and the mask cuts the window.
    cache = DynamicCache()
    for layer in range(layers):
        key, value = (torch.zeros(_BATCH, heads, _PAST, size, dtype=dtype, **meta) for _ in range(2))
        cache.update(key, value, layer)
    return {
        "input_ids": torch.zeros(_BATCH, _LENGTH, dtype=torch.int64, **meta),
        "attention_mask": torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64, **meta),
        "position_ids": torch.zeros(_BATCH, _LENGTH, dtype=torch.int64, **meta),
        CACHE_NAME: cache,
        "use_cache": True,
    }


def _dynamic_shapes(config: PretrainedConfig) -> dict[str, Any]:
    auto = Dim.AUTO
    tokens = {0: auto, 1: auto}
    caches = [{0: auto, 2: auto} for _ in range(2 * config.num_hidden_layers)]
    return {
        "input_ids": tokens,
        "attention_mask": tokens,
        "position_ids": tokens,
        CACHE_NAME: caches,
        "use_cache": None,
    }


def _relink(module: nn.Module, twin: nn.Module) -> None:
    """Replace captured graphs of linears by the twin's linears, so that peft and matching find them."""
    for name, source in twin.named_modules():
        if isinstance(source, nn.Linear):
            try:
                module.get_submodule(name)
            except AttributeError:
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, source)


def _root(module: nn.Module) -> fx.GraphModule:
    """Return the outermost graph of the unflattened module as a plain GraphModule with flat inputs and outputs."""
    graph = module.graph
    assert isinstance(graph, fx.Graph)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name == "use_cache" and not node.users:
            graph.erase_node(node)
        elif node.op == "placeholder" and node.name.startswith(f"{CACHE_NAME}_"):
            node.name = node.target = "past_key_values_" + node.name.removeprefix(f"{CACHE_NAME}_")
    root = fx.GraphModule(module, graph, class_name="CapturedModel")
    root.graph.lint()
    return root


def _check_outputs(graph: fx.GraphModule, config: PretrainedConfig) -> None:
    """Refuse a model that returns no key/value cache, such as an encoder with a language model head."""
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    expected = 1 + 2 * config.num_hidden_layers
    if len(outputs) != expected:
        raise InputError(
            f"{config.model_type}: the model returns {len(outputs)} tensors, expected {expected} (logits, and keys and "
            "values of every layer); convert a decoder-only model with a key/value cache"
        )


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, parameter)


def _tied_names(config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return which weight takes the values of which other: the head those of the embedding, or the reverse."""
    if not config.tie_word_embeddings:
        return {}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    alone = _found(head, weights) in weights and _found(embedding, weights) not in weights
    return {embedding: head} if alone else {head: embedding}


def _found(name: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Return a weight's name in a checkpoint, where transformers' prefix of it may be missing or doubled."""
    return next((key for key in (name, name.removeprefix(_PREFIX), _PREFIX + name) if key in weights), name)


def _missing(name: str, parameter: nn.Parameter, weights: Mapping[str, torch.Tensor]) -> str:
    wrapped = next((key for key in weights if key.endswith(f".{name}")), None)
    if wrapped is None:
        return f"expected {list(parameter.shape)}"
    prefix = wrapped.removesuffix(name)
    return (
        f"it is there as {wrapped}; remove the prefix {prefix} from all names, or save the model again without the "
        "wrapper that it was in (a PEFT model: merge_and_unload())"
    )


def _same(weight: torch.Tensor, other: torch.Tensor) -> bool:
    return weight.dtype == other.dtype and torch.equal(weight, other)


def _warn_about_unused(model_type: str, names: Set[str]) -> None:
    """Warn about weights that the model does not use, such as biases that the configuration switches off."""
    unread = sorted(name for name in names if not name.endswith(_COMPUTED))
    if unread:
        log.warning(
            "%d weights of the checkpoint are not used; the %s that config.json describes lacks them: %s%s",
            len(unread),
            model_type,
            ", ".join(unread[:3]),
            ", ..." if len(unread) > 3 else "",
        )


def _rebuild_buffers(captured: Captured, device: torch.device | str) -> None:
    """Compute non-persistent buffers (rotary frequencies), which a model on the meta device does not have."""
    twin = _meta_twin(captured.config, captured.dtype)
    made: dict[str, nn.Module] = {}
    for name, buffer in list(captured.graph.named_buffers(remove_duplicate=False)):
        if buffer.device.type != "meta":
            continue
        captured_owner, _, leaf = name.rpartition(".")
        owner = _CALL_NUMBER.sub("", captured_owner)  # the graph of a second call has a number
        scale = getattr(twin.get_submodule(owner), "scalar_embed_scale", None)
        if leaf == "embed_scale" and scale is not None:  # Gemma's embedding needs more than the configuration
            value = torch.tensor(scale, dtype=buffer.dtype, device=device)
            setattr(captured.graph.get_submodule(captured_owner), leaf, value)
            continue
        if owner not in made:
            try:
                made[owner] = type(twin.get_submodule(owner))(captured.config)
            except Exception as error:
                raise InputError(
                    f"buffer {name}: {owner} cannot be rebuilt ({error}); this architecture is not supported"
                ) from error
        value = getattr(made[owner], leaf).to(device)
        setattr(captured.graph.get_submodule(captured_owner), leaf, value)
