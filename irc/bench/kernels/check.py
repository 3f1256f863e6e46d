"""Compares the kernels of an operator library with the eager operators, node by node, on random shapes.

`examples/bench_gpu.py` runs this check on the CUDA library before it times anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnx import ModelProto, helper
from torch import Tensor

from exporters.onnx_dtypes import ALL, FLOATS
from exporters.onnx_format import DOMAIN, VERSION
from exporters.onnx_ops import function_protos
from irc.bench.kernels.attention import draw_attention
from irc.bench.kernels.products import PRODUCTS, draw_products
from irc.dtypes import torch_dtype
from irc.files.untrusted import first_line
from irc.runtime.provider import onnxruntime
from passes import dialect  # noqa: F401 - registers the operators

DTYPES = {kind.short: torch_dtype(kind.short) for kind in FLOATS}
PADDED = {f"{name}, padded": name for name in ("SelectRows", "DecideRows")}
_MOVES = ("Compact", "Scatter", "ScatterAdd", "RaggedPlaces")
OPERATORS = (*PADDED.values(), *PADDED, *_MOVES, *PRODUCTS, "RoutedAttention")
_CODES = {getattr(torch, kind.long): kind.code for kind in ALL}


@dataclass(frozen=True)
class KernelResult:
    """The result of checking one operator in one data type.

    Attributes:
        operator: Name of the operator in domain `irc`.
        dtype: fp32, fp16 or bf16.
        cases: Number of random inputs.
        wrong: Number of inputs on which the kernel failed or gave a wrong output. Outputs of products and attention may
            differ by rounding; all others must be equal bit for bit, where NaN equals NaN.
        reason: Why the last of them was wrong; empty if none was.
    """

    operator: str
    dtype: str
    cases: int
    wrong: int
    reason: str


class NodeRunner:
    """Runs single nodes of domain `irc` on a provider, with inputs and outputs on the host.

    Args:
        library: An operator library, or None for the portable bodies.
        provider: ONNX Runtime's name of a provider.
        threads: Threads per node; 0 lets ONNX Runtime choose.
    """

    def __init__(self, library: Path | None, provider: str, threads: int = 0) -> None:
        self.library, self._provider, self._threads = library, provider, threads
        self._sessions: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, operator: str, inputs: Sequence[Tensor], outputs: Sequence[torch.dtype], **attributes: Any
    ) -> list[Tensor]:
        """Run a node.

        Args:
            operator: Name of the operator.
            inputs: In the operator's order.
            outputs: Data type of each output.
            **attributes: Attributes of the node.

        Returns:
            The outputs.
        """
        session = self._session(operator, tuple(x.dtype for x in inputs), tuple(outputs), attributes)
        binding = session.io_binding()
        kept = [x.contiguous() for x in inputs]
        for index, x in enumerate(kept):
            binding.bind_input(f"x{index}", "cpu", 0, _CODES[x.dtype], tuple(x.shape), x.data_ptr())
        for index in range(len(outputs)):
            binding.bind_output(f"y{index}", "cpu")
        session.run_with_iobinding(binding)
        return [_tensor(value, kind) for value, kind in zip(binding.get_outputs(), outputs, strict=True)]

    def _session(
        self,
        operator: str,
        kinds: tuple[torch.dtype, ...],
        outputs: tuple[torch.dtype, ...],
        attributes: Mapping[str, Any],
    ) -> Any:
        key = operator, kinds, outputs, tuple(attributes.items())
        if key not in self._sessions:
            model = _one_node_model(operator, kinds, outputs, attributes)
            ort = onnxruntime()
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, self._threads
            if self.library is not None:
                options.register_custom_ops_library(str(self.library))
            # Turn off TF32, which rounds the float32 inputs of products to ten bits.
            provider = (self._provider, {"use_tf32": "0"}) if "CUDA" in self._provider else self._provider
            self._sessions[key] = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
        return self._sessions[key]


def _one_node_model(
    operator: str, inputs: Sequence[torch.dtype], outputs: Sequence[torch.dtype], attributes: Mapping[str, Any]
) -> ModelProto:
    """Return a model of one node with inputs x0, x1, ... and outputs y0, y1, ... of the given data types."""
    x = [helper.make_tensor_value_info(f"x{index}", _CODES[kind], None) for index, kind in enumerate(inputs)]
    y = [helper.make_tensor_value_info(f"y{index}", _CODES[kind], None) for index, kind in enumerate(outputs)]
    names = [value.name for value in x], [value.name for value in y]
    node = helper.make_node(operator, *names, domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", x, y)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = function_protos({operator}, half=bool({torch.float16, torch.bfloat16}.intersection(inputs)))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=bodies)


def check_kernels(library: Path | None, provider: str, cases: int = 24, seed: int = 0) -> list[KernelResult]:
    """Run each operator on random inputs. They include NaN, and shapes without rows, with all rows or without tokens.

    Args:
        library: The CUDA operator library, or None for the portable bodies.
        provider: ONNX Runtime's name of the provider that the library has kernels for.
        cases: Number of random inputs for each data type.
        seed: Seed of the inputs.

    Returns:
        One entry for each operator and data type.
    """
    run = NodeRunner(library, provider)
    results = []
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(seed)
        reasons: dict[str, list[str]] = {op: [] for op in OPERATORS if library is not None or op not in PADDED}
        for case in range(cases):
            drawn = random_case(generator, case)
            for operator, reason in check_case(run, drawn, dtype, generator).items():
                if reason:
                    reasons[operator].append(reason)
        for operator, failures in reasons.items():
            results.append(KernelResult(operator, name, cases, len(failures), failures[-1] if failures else ""))
    return results


def random_case(generator: torch.Generator, case: int) -> dict[str, Any]:
    """Return `batch`, `tokens`, `width` and `share` (of executed tokens) of a case: edge cases first, then random."""
    edge_cases = [(1, 1, 8, 0.0), (1, 1, 8, 1.0), (3, 0, 4, 0.5), (0, 3, 4, 0.5), (2, 4097, 3, 0.5), (8, 1, 64, 0.5)]
    edge_cases += [(1, 9000, 1, 1.0), (3, 300, 16, 0.0), (2, 5, 2100, 0.5)]
    if case < len(edge_cases):
        batch, tokens, width, share = edge_cases[case]
    else:
        batch, tokens = _integer(generator, 1, 9), _integer(generator, 1, 600)
        width = _integer(generator, 1, 40) * (1, 8)[_integer(generator, 0, 2)]
        share = _integer(generator, 0, 11) / 10
    return {"batch": batch, "tokens": tokens, "width": width, "share": share}


def check_case(
    run: NodeRunner, case: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, str]:
    """Run every operator on one case.

    Padding rows are given to the kernels of a library only; the portable bodies do not accept them.

    Args:
        run: Runs the nodes.
        case: What `random_case` returned.
        dtype: Data type of the numbers.
        generator: Source of the numbers.

    Returns:
        Why each operator's outputs are wrong, or an empty string if they are right.
    """
    irc = torch.ops.irc
    shape = case["batch"], case["tokens"], case["width"]
    mask = torch.rand(shape[:2], generator=generator) < case["share"]
    x, base = (torch.randn(shape, generator=generator) for _ in range(2))
    x, base = (torch.where(torch.rand(shape, generator=generator) < 0.01, torch.nan, t).to(dtype) for t in (x, base))
    # Among the differences of executed tokens, one in four is NaN and another is 0.
    drawn = torch.randint(0, 4, shape[:2], generator=generator)
    difference = torch.where(mask, torch.tensor([torch.nan, 0.0, 1.0, torch.inf])[drawn], -(drawn + 1.0))
    executed, skipped = irc.select_rows(mask)
    y, like = irc.compact(x, executed), torch.zeros(shape[0], shape[1], 2, dtype=dtype)
    row_cases: dict[str, tuple[list[Tensor], list[Tensor]]] = {
        "SelectRows": ([mask], [executed, skipped]),
        "DecideRows": ([difference], [executed, skipped]),
        "Compact": ([x, executed], [y]),
        "Scatter": ([y, executed, base], [irc.scatter(y, executed, base)]),
        "ScatterAdd": ([y, executed, base], [irc.scatter_add(y, executed, base)]),
        "RaggedPlaces": ([executed, like], ragged_places(mask)),
    }
    pads = run.library is not None
    if pads:
        padded = [_padded(rows, mask.numel()) for rows in (executed, skipped)]
        row_cases |= {name: (row_cases[plain][0], padded) for name, plain in PADDED.items()}
    reasons = {}
    for name, (inputs, expected) in row_cases.items():
        attributes = {"padded": mask.numel()} if name in PADDED else {}
        kinds = [tensor.dtype for tensor in expected]
        is_right = partial(_equal, expected=expected)
        reasons[name] = _wrong(run, Node(PADDED.get(name, name), inputs, kinds, attributes), is_right)
    for name, product in draw_products(x, skipped, generator, pads).items():
        reasons[name] = _wrong(run, Node(name, product.inputs, [product.kind], {}), product.are_near)
    batch, tokens = min(max(1, case["batch"]), 9), min(max(1, case["tokens"]), 300)
    attention = draw_attention(batch, tokens, case["share"], dtype, generator, pads)
    node = Node("RoutedAttention", attention.inputs, [dtype] * 3, attention.attributes)
    reasons[node.operator] = _wrong(run, node, attention.is_near)
    return reasons


class Node(NamedTuple):
    """A node to run: its operator, inputs, the data types of its outputs, and its attributes."""

    operator: str
    inputs: Sequence[Tensor]
    outputs: Sequence[torch.dtype]
    attributes: Mapping[str, Any]


def _wrong(run: NodeRunner, node: Node, is_right: Callable[[list[Tensor]], bool]) -> str:
    """Run a node; return why its outputs are wrong, or an empty string if they are right."""
    try:
        outputs = run(node.operator, node.inputs, node.outputs, **node.attributes)
    except Exception as error:  # ONNX Runtime has no exception class of its own
        reason = first_line(error, 1000)
    else:
        if is_right(outputs):
            return ""
        reason = "wrong numbers"
    return f"inputs of shapes {[list(tensor.shape) for tensor in node.inputs]}: {reason}"


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat((rows, rows.new_full((1, count - rows.shape[1], 2), -1)), 1)


def ragged_places(mask: Tensor) -> list[Tensor]:
    """Return the outputs of RaggedPlaces, places and index, for the true tokens of a bool [batch, tokens]."""
    order = torch.cumsum(mask, 1) - 1
    counts = mask.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    sequence, token = mask.nonzero(as_tuple=True)
    place = order[sequence, token]
    index = torch.zeros(len(mask), longest, dtype=torch.int64)
    index[sequence, place] = torch.arange(len(place))
    return [torch.stack((sequence, place), 1).unsqueeze(0), index]


def _equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(found, expected, strict=True)
    )


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def _tensor(value: Any, kind: torch.dtype) -> Tensor:
    if kind == torch.bfloat16:
        if 0 in value.shape():
            return torch.empty(value.shape(), dtype=kind)
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy().copy())
