"""Writes a captured model, plain or rewritten, as ONNX: lowering, torch.export, torch.onnx, tidying, external data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import fx, nn
from torch.export import Dim
from torch.fx.traceback import preserve_node_meta

from exporters.onnx_format import (
    DATA,
    DOMAIN,
    LEAST_ORT,
    MODEL,
    MODEL_VERSION,
    OPSET,
    PAST,
    PRESENT,
    VERSION,
    CacheShape,
    Decision,
    Quantization,
)
from exporters.onnx_interface import complete_interface
from exporters.onnx_names import name_all, note_modules
from exporters.onnx_ops import function_protos
from exporters.onnx_quantize import quantize_weights
from exporters.onnx_rounding import Gptq
from exporters.onnx_table import UNIT, translations
from exporters.onnx_weights import WeightSource, numbers, read_placeholders, store_transposed
from passes.base import Pass, PassError, PassManager
from passes.clean_up import CleanUp
from passes.fuse_gates import FuseGates
from passes.lower_units import LowerUnits
from passes.name_modules import NameModules
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms
from passes.route_experts import RouteExperts
from passes.route_products import RouteProducts
from passes.tracing import tracing

log = logging.getLogger(__name__)

_IN_THE_GRAPH = WeightSource()


def lowering(provider: str = "cpu") -> list[Pass]:
    """Return the passes that prepare a captured model for export to run on one of `PROVIDERS`, in order."""
    cuda: list[Pass] = [RouteProducts(), FuseGates()] if provider == "cuda" else []
    return [RaiseNorms(), RaiseAttention(), LowerUnits(), RouteExperts(), *cuda, CleanUp(), NameModules()]


@dataclass(frozen=True)
class Description:
    """What a model file says about itself.

    Attributes:
        version: Version of irc, the producer.
        text: The doc string, for people.
        metadata: Properties beside operator version and least ONNX Runtime.
        quantization: How the base's linears and embedding are stored in blocks; None as they are.
    """

    version: str
    text: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None


class _Deployed(nn.Module):
    """The captured model with the inputs of a deployed one: it counts positions from the mask."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.model = graph

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
        slots: list[torch.Tensor],
    ) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(input_ids, attention_mask, positions[:, -input_ids.shape[1] :], *past, *slots)


def export_onnx(
    graph: fx.GraphModule,
    cache: CacheShape,
    dtype: torch.dtype,
    folder: Path,
    description: Description,
    dump_dir: Path | None = None,
    provider: str = "cpu",
    weights: WeightSource = _IN_THE_GRAPH,
) -> list[Decision]:
    """Lower a captured model in place and write `model.onnx` and `model.onnx.data` into a folder.

    Args:
        graph: A captured model, rewritten or not; afterwards it is lowered.
        cache: Shape of its key/value cache.
        dtype: Of its weights.
        folder: An existing folder.
        description: What the file says about itself, and how its weights are stored.
        dump_dir: Where every pass writes its before, after and diff.
        provider: One of `PROVIDERS`, for which the model is optimized; every provider runs it.
        weights: Where the numbers of its weights come from.

    Returns:
        One decision for each routed unit, in the order in which a token meets them.

    Raises:
        PassError: A unit cannot be lowered.
    """
    quantization = description.quantization
    PassManager(lowering("cpu" if quantization else provider), dump_dir).run(graph)
    model = _translate(_Deployed(graph), cache, dtype, quantization, weights)
    for cleaning in (RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        cleaning(model)
    name_all(model)
    decisions = _name_decisions(model)
    _name_interface(model, cache)
    ClearMetadataAndDocStringPass()(model)
    complete_interface(model, decisions, cache.layers)
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = VERSION
        operators = {node.op_type for node in model.graph if node.domain == DOMAIN}
        for proto in function_protos(operators, half=dtype != torch.float32):
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
    versions = {"irc.opset": str(OPSET), "irc.op_version": str(VERSION), "irc.least_onnxruntime": LEAST_ORT}
    model.metadata_props.update({**description.metadata, **versions})
    model.producer_name, model.producer_version = "irc", description.version
    model.doc_string, model.model_version = description.text, MODEL_VERSION
    release = weights.release
    ir.save(model, folder / MODEL, external_data=DATA, callback=(lambda *_: release()) if release else None)
    return decisions


def _translate(
    module: nn.Module,
    cache: CacheShape,
    dtype: torch.dtype,
    quantization: Quantization | None,
    weights: WeightSource,
) -> ir.Model:
    """Run torch.export and torch.onnx.export, quantize weights, then fold constants and merge equal nodes."""
    device = next(module.parameters()).device
    batch, tokens, past = 2, 3, 5
    # Separate tensors: torch.export would take one tensor given twice for one input.
    stored = [past - 1 if layer in cache.reduced else past for layer in range(cache.layers) for _ in range(2)]
    caches = [torch.zeros(batch, cache.heads, count, cache.size, dtype=dtype, device=device) for count in stored]
    slots = [torch.zeros(batch, past - 1, dtype=torch.int64, device=device) for _ in cache.reduced]
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    mask = torch.ones(batch, past + tokens, dtype=torch.int64, device=device)
    auto = Dim.AUTO
    two = {0: auto, 1: auto}
    shapes = (two, two, [{0: auto, 2: auto} for _ in caches], [two for _ in slots])
    # Hides the notice that torchvision is missing, whose operators language models do not use.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    # preserve_node_meta: what NameModules noted reaches the nodes of the ONNX graph.
    with torch.no_grad(), warnings.catch_warnings(), tracing(), preserve_node_meta():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (ids, mask, caches, slots), dynamic_shapes=shapes, strict=False)
        converted = torch.onnx.export(
            program,
            custom_translation_table=translations(),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert converted is not None
    model = converted.model
    note_modules(model)
    CommonSubexpressionEliminationPass()(model)  # a weight that two nodes read is then transposed once
    if weights.find:
        read_placeholders(model, weights.find)
    again = Gptq(weights.moments, quantization) if quantization and weights.moments else None
    if quantization and not quantize_weights(model, quantization, numbers, weights.release, again):
        raise PassError("model", f"a weight that {quantization.name} can hold", "export it in another type")
    if again and again.unread:
        log.warning(
            "%d weights are rounded to the nearest numbers, because no token of the text reached them; the first is %s",
            len(again.unread),
            again.unread[0],
        )
    store_transposed(model)  # before constants are folded: a folded weight would lose its name
    onnxscript.optimizer.optimize(model, input_size_limit=1024, output_size_limit=1024)
    CommonSubexpressionEliminationPass()(model)
    return model


def _name_interface(model: ir.Model, cache: CacheShape) -> None:
    """Give inputs and outputs the names and the symbolic sizes that runtimes expect."""
    batch, tokens, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    head = model.graph.outputs[0].shape
    assert head is not None
    inputs: list[tuple[str, Sequence[str | int]]] = [("input_ids", (batch, tokens)), ("attention_mask", (batch, total))]
    outputs: list[tuple[str, Sequence[str | int]]] = [("logits", (batch, tokens, cast(int, head[-1])))]
    for values, stem, length in ((inputs, PAST, past), (outputs, PRESENT, total)):
        lengths = [f"stored_{length}.{layer}" if layer in cache.reduced else length for layer in range(cache.layers)]
        for layer, part in ((layer, part) for layer in range(cache.layers) for part in ("key", "value")):
            values.append((f"{stem}.{layer}.{part}", (batch, cache.heads, lengths[layer], cache.size)))
        values += [(f"{stem}.{layer}.slots", (batch, lengths[layer])) for layer in cache.reduced]
    for found, wanted in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, (name, shape) in zip(found, wanted, strict=True):
            value.name = name
            value.shape = ir.Shape(shape)


def _name_decisions(model: ir.Model) -> list[Decision]:
    """Name the logit differences of all routed units, in order: what the DecideRows of each unit reads."""
    found: list[Decision] = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == "DecideRows":
            difference, decision = node.inputs[0], Decision.of(node.metadata_props[UNIT])
            assert difference is not None
            difference.name = decision.difference
            found.append(decision)
    return found
