"""Gives a PyTorch model the weights that a quantized ONNX folder computes with."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from exporters.onnx_quantize import PACKED, SCALES, ZEROS, Blocks, dequantize, shapes_of
from irc.deployment.model_file import read_model
from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.runtime.folder import OnnxFolder
from irc.training.lora import merge_lora


@torch.no_grad()
def use_quantized_weights(model: RoutedForCausalLM, exported: OnnxFolder) -> None:
    """Replace every weight that a folder holds in blocks by the numbers that the blocks stand for.

    Args:
        model: What the folder was exported from; LoRA adapters are merged first, as by the export.
        exported: A folder with quantized weights.

    Raises:
        InputError: The folder has blocks that fit no weight of the model.
    """
    how = exported.quantization
    assert how is not None
    merge_lora(model)
    stored = {tensor.name: tensor for tensor in read_model(exported.model, exported.weights).graph.initializer}
    places: dict[int, list[str]] = defaultdict(list)  # names of a parameter, several if it is tied
    parameters = dict(model.graph.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        places[id(parameter)].append(name)
    for name in [tensor.removesuffix(f".{PACKED}") for tensor in stored if tensor.endswith(f".{PACKED}")]:
        parts = [
            _read(stored[f"{name}.{end}"], exported) for end in (PACKED, SCALES, ZEROS) if f"{name}.{end}" in stored
        ]
        weight = parameters.get(name)
        found = [part.shape for part in parts]
        if weight is None or weight.dim() != 2 or found not in shapes_of(weight.shape[0], weight.shape[1], how):
            raise InputError(
                f"{exported.model}: its blocks {name[:80]} fit no weight of {model.base.name}; export again"
            )
        blocks = Blocks(parts[0], parts[1], parts[2] if len(parts) > 2 else None)
        numbers = torch.from_numpy(dequantize(blocks, weight.shape[1], how)).to(weight)
        for place in places[id(weight)]:
            path, _, leaf = place.rpartition(".")
            setattr(model.graph.get_submodule(path), leaf, nn.Parameter(numbers, requires_grad=False))
    model.rewritten()


def _read(tensor: onnx.TensorProto, exported: OnnxFolder) -> NDArray[Any]:
    """Return a tensor of a checked model."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = Path(exported.model).with_name(facts["location"])
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return np.fromfile(path, kind, count, offset=int(facts.get("offset") or 0)).reshape(tuple(tensor.dims))
