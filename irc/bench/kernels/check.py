"""Holds an operator library's kernels against the eager dialect, node by node on random shapes.

`examples/bench_gpu.py` asks this first of the CUDA library on a card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper
from torch import Tensor

from exporters.onnx_ops import DOMAIN, VERSION, function_protos
from irc.bench.kernels.attention import draw_attention
from irc.bench.kernels.products import PRODUCTS, draw_products
from irc.files.untrusted import first_line
from irc.runtime.cache import onnxruntime
from passes import dialect  # noqa: F401 - registers the operators

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PADDED = {f"{name}, padded": name for name in ("SelectRows", "DecideRows")}
_MOVES = ("Compact", "Scatter", "ScatterAdd", "RaggedPlaces")
OPERATORS = (*PADDED.values(), *PADDED, *_MOVES, *PRODUCTS, "RoutedAttention")
_KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Found:
    """What became of one operator in one type.

    Attributes:
        operator: Its name in domain `irc`.
        dtype: fp32, fp16 or bf16.
        cases: How many random inputs it was given.
        wrong: In how many of them it failed, or any output differed in a single bit (NaN equals NaN), of products
            and attention by more than rounding.
        reason: Of the last failure, empty where there was none.
    """

    operator: str
    dtype: str
    cases: int
    wrong: int
    reason: str


class NodeRunner:
    """Runs single nodes of domain `irc` on a provider, with inputs and outputs on the host.

    Args:
        library: An operator library, None for the portable bodies.
        provider: ONNX Runtime's name of a provider.
        threads: Of one node; 0 leaves it to ONNX Runtime.
    """

    def __init__(self, library: Path | None, provider: str, threads: int = 0) -> None:
        self.library, self._provider, self._threads = library, provider, threads
        self._sessions: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, operator: str, inputs: Sequence[Tensor], outputs: Sequence[torch.dtype], **attributes: Any
    ) -> list[Tensor]:
        """Return the outputs, whose types are given."""
        session = self._session(operator, tuple(x.dtype for x in inputs), tuple(outputs), attributes)
        binding = session.io_binding()
        kept = [x.contiguous() for x in inputs]
        for index, x in enumerate(kept):
            binding.bind_input(f"x{index}", "cpu", 0, _KINDS[x.dtype], tuple(x.shape), x.data_ptr())
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
            names = [f"x{index}" for index in range(len(kinds))], [f"y{index}" for index in range(len(outputs))]
            given, made = (
                [
                    helper.make_tensor_value_info(name, _KINDS[kind], None)
                    for name, kind in zip(side, types, strict=True)
                ]
                for side, types in zip(names, (kinds, outputs), strict=True)
            )
            node = helper.make_node(operator, *names, domain=DOMAIN, **attributes)
            graph = helper.make_graph([node], "one", given, made)
            sets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
            bodies = function_protos({operator}, half=bool({torch.float16, torch.bfloat16}.intersection(kinds)))
            model = helper.make_model(graph, opset_imports=sets, ir_version=10, functions=bodies)
            ort = onnxruntime()
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, self._threads
            if self.library is not None:
                options.register_custom_ops_library(str(self.library))
            # Without TF32, which rounds what products of float32 read to ten bits.
            how = (self._provider, {"use_tf32": "0"}) if "CUDA" in self._provider else self._provider
            self._sessions[key] = ort.InferenceSession(model.SerializeToString(), options, providers=[how])
        return self._sessions[key]


def check_kernels(library: Path | None, provider: str, cases: int = 24, seed: int = 0) -> list[Found]:
    """Run each operator on random shapes, among them no row, all rows and no token, with NaN among the numbers.

    Args:
        library: The CUDA operator library, None for the portable bodies.
        provider: ONNX Runtime's name of the provider that it has kernels for.
        cases: Random inputs for each type.
        seed: Of the inputs.

    Returns:
        One entry for each operator and type.
    """
    run = NodeRunner(library, provider)
    found = []
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(seed)
        reasons: dict[str, list[str]] = {op: [] for op in OPERATORS if library is not None or op not in PADDED}
        for case in range(cases):
            drawn = random_case(generator, case)
            for operator, reason in check_case(run, drawn, dtype, generator).items():
                reasons[operator] += [reason] if reason else []
        for operator, failed in reasons.items():
            found.append(Found(operator, name, cases, len(failed), failed[-1] if failed else ""))
    return found


def random_case(generator: torch.Generator, case: int) -> dict[str, Any]:
    """Draw a batch, tokens, a width, and the share of executed tokens; the first cases are the edges."""
    edges = [(1, 1, 8, 0.0), (1, 1, 8, 1.0), (3, 0, 4, 0.5), (0, 3, 4, 0.5), (2, 4097, 3, 0.5), (8, 1, 64, 0.5)]
    edges += [(1, 9000, 1, 1.0), (3, 300, 16, 0.0), (2, 5, 2100, 0.5)]
    if case < len(edges):
        batch, tokens, width, share = edges[case]
    else:
        batch, tokens = _integer(generator, 1, 9), _integer(generator, 1, 600)
        width = _integer(generator, 1, 40) * (1, 8)[_integer(generator, 0, 2)]
        share = _integer(generator, 0, 11) / 10
    return {"batch": batch, "tokens": tokens, "width": width, "share": share}


def check_case(
    run: NodeRunner, case: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, str]:
    """Return for each operator how it differs from the eager one, empty where every bit of all outputs is the same.

    Products and attention may differ by rounding. Rows that are nothing are given to kernels only.
    """
    irc = torch.ops.irc
    shape = case["batch"], case["tokens"], case["width"]
    mask = torch.rand(shape[:2], generator=generator) < case["share"]
    x, base = (torch.randn(shape, generator=generator) for _ in range(2))
    x, base = (torch.where(torch.rand(shape, generator=generator) < 0.01, torch.nan, t).to(dtype) for t in (x, base))
    # Of what executes one difference in four is no number, another 0.
    drawn = torch.randint(0, 4, shape[:2], generator=generator)
    difference = torch.where(mask, torch.tensor([torch.nan, 0.0, 1.0, torch.inf])[drawn], -(drawn + 1.0))
    executed, skipped = irc.select_rows(mask)
    y, like = irc.compact(x, executed), torch.zeros(shape[0], shape[1], 2, dtype=dtype)
    wanted: dict[str, tuple[list[Tensor], list[Tensor]]] = {
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
        wanted |= {name: (wanted[plain][0], padded) for name, plain in PADDED.items()}
    found = {}
    for name, (inputs, expected) in wanted.items():
        operator, attributes = PADDED.get(name, name), {"padded": mask.numel()} if name in PADDED else {}
        outputs = _run(run, operator, inputs, [tensor.dtype for tensor in expected], attributes)
        right = not isinstance(outputs, str) and _equal(outputs, expected)
        found[name] = "" if right else f"{list(shape)}: {outputs if isinstance(outputs, str) else 'other numbers'}"
    for name, product in draw_products(x, skipped, generator, pads).items():
        outputs = _run(run, name, product.inputs, [product.kind], {})
        right = not isinstance(outputs, str) and product.is_near(outputs[0])
        sizes = [list(tensor.shape) for tensor in product.inputs]
        found[name] = "" if right else f"{sizes}: {outputs if isinstance(outputs, str) else 'other numbers'}"
    batch, tokens = (min(max(1, case[name]), most) for name, most in (("batch", 9), ("tokens", 300)))
    attention = draw_attention(batch, tokens, case["share"], dtype, generator, pads)
    outputs = _run(run, "RoutedAttention", attention.inputs, [dtype] * 3, attention.attributes)
    right = not isinstance(outputs, str) and attention.is_near(outputs)
    sizes = [list(tensor.shape) for tensor in attention.inputs]
    found["RoutedAttention"] = "" if right else f"{sizes}: {outputs if isinstance(outputs, str) else 'other numbers'}"
    return found


def _run(
    run: NodeRunner,
    operator: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[torch.dtype],
    attributes: Mapping[str, Any],
) -> list[Tensor] | str:
    """Return the outputs, or why there are none."""
    try:
        return run(operator, inputs, outputs, **attributes)
    except Exception as error:  # of ONNX Runtime, which has no class of its own for them
        return first_line(error, 1000)


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat((rows, rows.new_full((1, count - rows.shape[1], 2), -1)), 1)


def ragged_places(mask: Tensor) -> list[Tensor]:
    """Return what RaggedPlaces gives for the true tokens of a bool [batch, tokens]: places and index."""
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
