"""Names that a person can read for every node, value and weight of an exported model.

Nodes are called after the module that they belong to and after their operator, such as
`/layers.0/mlp/up_proj/MatMul`; values after the node that makes them; weights as in the checkpoint, such as
`model.layers.0.mlp.up_proj.weight`; small constants after their content.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import onnx_ir as ir

from passes.name_modules import MODULE

ROOT = "model"
"""Name of the whole model: the attribute under which it is exported, and the scope of nodes of no smaller module."""
_SHORT = 8  # elements of a constant that its name can hold


def note_modules(model: ir.Model) -> None:
    """Write the path of each node's module into its metadata, which optimizers copy to the nodes that replace it.

    Args:
        model: As torch.onnx made it, from a graph that `passes.name_modules.NameModules` has seen.
    """
    for node in model.graph:
        made_from = node.meta.get("node")
        node.metadata_props[MODULE] = _module_of(made_from.meta) if made_from is not None else ""


def _module_of(meta: dict[str, object]) -> str:
    custom = cast("dict[str, str]", meta.get("custom") or {})
    if MODULE in custom:
        return custom[MODULE]
    # The outermost graph runs as Python code, so what it calls has a stack of modules alone.
    stack = list(cast("dict[str, tuple[str, object]]", meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return path if path.isprintable() and not path.startswith("_") else ""


def name_all(model: ir.Model) -> None:
    """Name all nodes, all values but the model's inputs and outputs, and all weights.

    Args:
        model: Optimized, with the metadata that `note_modules` wrote.
    """
    names = _Names()
    interface = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.name = names.new(f"{_scope(node.metadata_props.get(MODULE, ''))}/{node.op_type}")
        for index, output in enumerate(node.outputs):
            if output not in interface:
                output.name = f"{node.name}_output_{index}"
    for value in list(model.graph.initializers.values()):
        value.name = names.new(_initializer_name(value))


def _scope(module: str) -> str:
    """Return the path of a module as a path of scopes: `model.layers.0.mlp` becomes `/layers.0/mlp`."""
    scopes: list[str] = []
    for part in module.split("."):
        if part.isdigit() and scopes:
            scopes[-1] += f".{part}"
        elif part and (scopes or part != ROOT):
            scopes.append(part)
    return "/" + "/".join(scopes or [ROOT])


def _initializer_name(value: ir.Value) -> str:
    name = str(value.name)
    if name.startswith(f"{ROOT}."):  # a weight, by its path in the module that holds the model
        return name.removeprefix(f"{ROOT}.")
    tensor = value.const_value
    assert tensor is not None
    if tensor.size <= _SHORT:
        content = str(tensor.numpy().tolist()).replace(" ", "")
        return f"/constants/{tensor.dtype.name.lower()}/{content}"
    reader, index = next(iter(value.uses()))
    return f"{reader.name}_input_{index}"


class _Names:
    """Gives names that are all different: a second `/And` is called `/And_1`."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    def new(self, name: str) -> str:
        self._count[name] += 1
        return name if self._count[name] == 1 else f"{name}_{self._count[name] - 1}"
