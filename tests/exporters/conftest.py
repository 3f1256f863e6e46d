"""A tiny routed model twice: the captured graph with its muxes, and ONNX sessions of its export."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from filelock import FileLock
from torch import fx

from exporters.onnx import MODEL, CacheShape, Decision, Description, export_onnx
from exporters.onnx_dtypes import ALL
from exporters.onnx_format import Quantization
from exporters.onnx_quantize import PACKED, SCALES, ZEROS, Blocks, dequantize
from irc.bench.kernels.attention import AttentionCase, AttentionSizes, HiddenKeys, attention_case
from irc.bench.kernels.check import NodeRunner
from irc.model.cache import cache_shape
from irc.model.modules import BottleneckRouter, Forecaster, Mux, Record, Router, RoutingControl, StoredKeys
from irc.runtime.native import installed_library
from passes.base import PassManager
from passes.insert_forecasters import InsertForecasters
from passes.insert_routers import InsertRouters
from passes.mask_skipped_keys import MaskSkippedKeys
from passes.match import Unit, match_units

LIBRARY = installed_library()
OPS = ("portable", "native") if LIBRARY else ("portable",)
SOURCES = Path(__file__).parents[2] / "exporters" / "native" / "src"
_CODES = {getattr(torch, kind.long): kind.code for kind in ALL}
TOLERANCE = 1e-4  # fp32, absolute, on logits
NEAR = 1e-4  # if two router logits are closer than this, rounding may decide a route
GATES = {"mixed": 0.0, "all executed": 1e3, "all skipped": -1e3}


@dataclass
class Pair:
    """A model in PyTorch and in ONNX Runtime; `gates` is a key of GATES.

    `all_ops` are the kinds of kernels that a session can have here: portable bodies, and native ones where installed.
    """

    reference: fx.GraphModule
    control: RoutingControl
    path: Path
    decisions: list[Decision]
    cache: CacheShape
    all_ops: tuple[str, ...] = OPS
    sessions: dict[tuple[str, str], ort.InferenceSession] = field(default_factory=dict)

    def _bias(self, amount: float) -> None:
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                if name.endswith("_router.2.bias"):
                    parameter[0] += amount

    @torch.no_grad()
    def torch(self, gates: str, ids: Any, mask: Any, past: list[Any]) -> tuple[list[Any], dict[str, Record]]:
        """Return outputs and records of the hardened decisions in PyTorch."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        tape: dict[str, Record] = {}
        self._bias(GATES[gates])
        with self.control.using(mode="route", tape=tape):
            outputs = self.reference(ids, mask, positions, *past)
        self._bias(-GATES[gates])
        return list(outputs), tape

    def onnx(
        self, gates: str, ids: Any, mask: Any, past: list[Any], slots: Sequence[Any] = (), ops: str = "portable"
    ) -> dict[str, Any]:
        """Return outputs and decisions of ONNX Runtime by name; `slots` are those of reduced layers."""
        session = self.session(gates, ops)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        for index, tensor in enumerate(past):
            feeds[f"past_key_values.{index // 2}.{('key', 'value')[index % 2]}"] = tensor.numpy()
        for layer, tensor in zip(self.cache.reduced, slots, strict=True):
            feeds[f"past_key_values.{layer}.slots"] = tensor.numpy()
        names = [output.name for output in session.get_outputs()]
        return {n: torch.from_numpy(np.array(v)) for n, v in zip(names, session.run(None, feeds), strict=True)}

    def session(self, gates: str, ops: str = "portable") -> ort.InferenceSession:
        """Return a session with routers biased by `gates`, and every logit difference as an output.

        `ops` is portable, native or the path of an operator library.
        """
        if (gates, ops) not in self.sessions:
            model = onnx.load(str(self.path))
            for tensor in model.graph.initializer:
                if tensor.name.endswith("_router.2.bias"):
                    values = onnx.numpy_helper.to_array(tensor).copy()
                    assert values.shape == (1,), "the difference of the logits is one output"
                    values[0] += GATES[gates]
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            for decision in self.decisions:
                value = onnx.helper.make_tensor_value_info(decision.difference, onnx.TensorProto.FLOAT, ["b", "s"])
                model.graph.output.append(value)
            options = ort.SessionOptions()
            if ops != "portable":
                assert ops != "native" or LIBRARY is not None
                options.register_custom_ops_library(str(LIBRARY.path) if LIBRARY and ops == "native" else ops)
            self.sessions[gates, ops] = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[gates, ops]


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Give `make_pair(tiny)`: insert untrained routers and forecasters, and export.

    `routed=False` exports densely; attention units of the layers `reduced` store executed tokens only; the model is
    optimized for `provider`; with `bottleneck`, routers read the bottleneck of their forecaster. With `quantization`,
    the reference has the weights that the blocks stand for.
    """

    def make(
        tiny: Any,
        routed: bool = True,
        reduced: tuple[int, ...] = (),
        provider: str = "cpu",
        bottleneck: bool = False,
        quantization: Quantization | None = None,
    ) -> Pair:
        control, dtype = RoutingControl(), tiny.captured.dtype
        torch.manual_seed(0)

        def router(unit: Unit) -> Router:
            if not bottleneck:
                return Router(unit.width, 8)
            return BottleneckRouter(tiny.graph.get_submodule(f"{unit.name}_forecaster"), 8)

        if routed:
            PassManager(
                [
                    InsertForecasters(
                        lambda unit: Forecaster(unit.width, 4).to(dtype), lambda unit: Mux(unit.name, control)
                    ),
                    InsertRouters(lambda unit: router(unit).to(dtype)),
                ]
            ).run(tiny.graph)
        attention = [unit.name for unit in match_units(tiny.graph).units if unit.kind == "attention"]
        control.reduced = frozenset(attention[layer] for layer in reduced)
        masks = MaskSkippedKeys(control.reduced, lambda unit: StoredKeys(unit.name, control))
        PassManager([masks]).run(tiny.graph)
        reference = copy.deepcopy(tiny.captured)
        # A copied mux holds a copy of the control.
        for module in reference.graph.modules():
            if isinstance(module, Mux | StoredKeys):
                module.control = control
        folder = tmp_path_factory.mktemp("onnx")
        cache = CacheShape(*cache_shape(tiny.config), reduced=reduced)
        about = Description("1.2.3", "A tiny model.", {"made.by": "tests"}, quantization)
        decisions = export_onnx(tiny.graph, cache, tiny.captured.dtype, folder, about, provider=provider)
        if quantization is not None:
            _use_blocks(reference.graph, folder / MODEL, quantization)
        return Pair(reference.graph, control, folder / MODEL, decisions, cache)

    return make


@pytest.fixture(scope="session")
def feeds() -> Callable[..., tuple[Any, Any, list[Any]]]:
    """Give `feeds(pair, case, dtype)`: ids, mask and cache of a case."""
    return _feeds


@pytest.fixture(scope="session")
def compare() -> Callable[[Pair, dict[str, Any]], bool]:
    """Give `compare(pair, case)`, which is False where rounding may decide a route."""
    return _compared


def _feeds(pair: Any, case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[Any]]:
    batch, length, past = case["batch"], case["length"], case["past"]
    generator = torch.Generator().manual_seed(case["seed"])
    ids = torch.randint(0, 61, (batch, length), generator=generator)
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    for row in range(batch):
        cut = int(torch.randint(0, past + length if case["padding"] == "left" else length, (), generator=generator))
        if case["padding"] == "left":
            mask[row, :cut] = 0
        elif case["padding"] == "right" and cut:
            mask[row, -cut:] = 0
    shape = (batch, pair.cache.heads, past, pair.cache.size)
    return ids, mask, [torch.randn(shape, generator=generator).to(dtype) for _ in range(2 * pair.cache.layers)]


def _compared(pair: Any, case: dict[str, Any]) -> bool:
    """Compare all outputs, with all kinds of kernels; returns False where rounding may decide a route."""
    ids, mask, past = _feeds(pair, case)
    real = mask[:, -ids.shape[1] :].bool()
    expected, tape = pair.torch(case["gates"], ids, mask, past)
    near = [record.difference.abs()[real].min().item() for record in tape.values() if record.difference is not None]
    if near and min(near) <= NEAR:
        return False
    for ops in pair.all_ops:
        found = pair.onnx(case["gates"], ids, mask, past, ops=ops)
        _check_outputs(pair, case, found, expected, tape, mask, real)
    return True


def _check_outputs(pair: Any, case: dict[str, Any], found: Any, expected: Any, tape: Any, mask: Any, real: Any) -> None:
    assert (found["logits"] - expected[0])[real].abs().max() <= TOLERANCE
    for index, tensor in enumerate(expected[1:]):
        name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
        assert found[name].shape == tensor.shape
        assert (found[name] - tensor).transpose(1, 2)[mask.bool()].abs().max() <= TOLERANCE
    for decision in pair.decisions:
        execute = tape[decision.unit].execute
        assert torch.equal(~(found[decision.difference] < 0)[real], execute[real]), decision.unit
        if case["gates"] != "mixed":
            assert bool(execute.all()) == (case["gates"] == "all executed")


def _use_blocks(graph: fx.GraphModule, path: Path, how: Quantization) -> None:
    """Give a module the weights of an exported model's blocks."""
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    for name in [name.removesuffix(f".{PACKED}") for name in stored if name.endswith(f".{PACKED}")]:
        parent, _, leaf = name.rpartition(".")
        module = graph.get_submodule(parent)
        weight = getattr(module, leaf)
        blocks = Blocks(stored[f"{name}.{PACKED}"], stored[f"{name}.{SCALES}"], stored.get(f"{name}.{ZEROS}"))
        found = torch.nn.Parameter(torch.from_numpy(dequantize(blocks, weight.shape[1], how)), requires_grad=False)
        for holder in graph.modules():  # all that are tied
            if getattr(holder, "weight", None) is weight:
                holder.weight = found


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile all sources of the CUDA library, warnings as errors, each launch as a loop over blocks and threads."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA kernels cannot be emulated")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # of all workers
    built = shared / "libirc_native_emulated.so"
    sources = [*sorted((SOURCES / "cuda").glob("*.cu")), SOURCES / "operators.cpp", SOURCES / "kernel.cpp"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    names = ["-DIRC_EMULATED", '-DIRC_VERSION="0"', '-DIRC_ARCHITECTURES="sm_80, sm_90"']
    with FileLock(f"{built}.lock"):
        if not built.exists():
            partial = built.with_suffix(".part")
            subprocess.run([compiler, *flags, *names, "-x", "c++", *sources, "-o", partial], check=True)
            partial.rename(built)
    return built


@pytest.fixture
def run(library: Path) -> NodeRunner:
    """Give a runner of single nodes on the emulated library."""
    return NodeRunner(library, "CPUExecutionProvider")


@pytest.fixture(scope="session")
def attention() -> Callable[..., AttentionCase]:
    """Give `attention(seed, **settings)`: an `attention_case` of a few tokens, with some settings changed.

    Settings are the fields of `AttentionSizes` and `HiddenKeys` (`hidden` is its share), `share`, `dtype`, `padding`.
    """
    usual = {"batch": 1, "tokens": 4, "past": 3, "kv_heads": 2, "group": 2, "size": 8}

    def make(seed: int = 1, window: int = 0, left: bool = False, hidden: float = 0.0, **settings: Any) -> AttentionCase:
        sizes = AttentionSizes(**{name: settings.pop(name, size) for name, size in usual.items()})
        keys = HiddenKeys(window, left, hidden)
        return attention_case(torch.Generator().manual_seed(seed), sizes, hidden=keys, **settings)

    return make


@pytest.fixture(scope="session")
def is_near() -> Callable[[AttentionCase, list[torch.Tensor]], bool]:
    """Give `is_near(case, found)`: within half of the tolerances for GPUs."""
    # Relative to the largest number: fp32 sums in another order; other types round weights and results once.
    tolerances = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    return lambda case, found: case.is_near(found, tolerances)


@pytest.fixture(scope="session")
def attend() -> Callable[[NodeRunner, AttentionCase], list[torch.Tensor]]:
    """Give `attend(run, case)`: y, keys and values of RoutedAttention."""
    return lambda run, case: run("RoutedAttention", case.inputs, [case.inputs[0].dtype] * 3, **case.attributes)


@pytest.fixture(scope="session")
def attend_in_place() -> Callable[[NodeRunner, AttentionCase, int], list[torch.Tensor]]:
    """Give `attend_in_place(run, case, room)`: as `attend`, with past and present in the same memory.

    The caches have `room` more places than tokens; they and those of new tokens are NaN before.
    """

    def call(run: NodeRunner, case: AttentionCase, room: int) -> list[torch.Tensor]:
        inputs = [x.contiguous() for x in case.inputs]
        more = (0, 0, 0, inputs[2].shape[1] + room)
        inputs[4:6] = [torch.nn.functional.pad(x, more, value=torch.nan) for x in inputs[4:6]]
        outputs = [torch.empty_like(inputs[0]), *inputs[4:6]]
        kinds = tuple(x.dtype for x in inputs), tuple(x.dtype for x in outputs)
        session = run._session("RoutedAttention", *kinds, case.attributes)
        binding = session.io_binding()
        for index, x in enumerate(inputs):
            binding.bind_input(f"x{index}", "cpu", 0, _CODES[x.dtype], tuple(x.shape), x.data_ptr())
        for index, x in enumerate(outputs):
            place = (0, _CODES[x.dtype], tuple(x.shape), x.data_ptr()) if x.numel() else ()
            binding.bind_output(f"y{index}", "cpu", *place)
        session.run_with_iobinding(binding)
        return outputs

    return call
