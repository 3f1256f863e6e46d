"""Keys and values on ONNX Runtime: caches that are copied as they grow, and caches that are written in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from exporters.onnx_dtypes import INT64, of_weights
from irc.runtime.one_node import one_node_model
from irc.runtime.provider import PROVIDERS, onnxruntime, session_options

_STEP = 64  # places are reserved in multiples of it


@dataclass(frozen=True)
class CacheLayout:
    """What the caches of one model have in common.

    Attributes:
        past: Names of the inputs: key and value of each layer, then slots of reduced layers.
        present: Names of the outputs, in the same order.
        layers: Decoder layers.
        heads: Key/value heads.
        size: Features of a head.
        dtype: fp32, fp16 or bf16.
        device: `cpu` or `cuda`.
        context: Maximum number of tokens of a text, None if the model does not say.
        spare: Memory of the last cache that is no longer used, for the next one: at most one (places, values).
    """

    past: Sequence[str]
    present: Sequence[str]
    layers: int
    heads: int
    size: int
    dtype: str
    device: str
    context: int | None = None
    spare: list[tuple[int, list[Any]]] = field(default_factory=list, compare=False)

    def empty(self, batch: int, places: int) -> list[Any]:
        """Return values with room for `places` tokens; their content is undefined."""
        make = onnxruntime().OrtValue.ortvalue_from_shape_and_type
        values = [
            make([batch, self.heads, places, self.size], of_weights(self.dtype).code, self.device)
            for _ in range(2 * self.layers)
        ]
        reduced = len(self.past) - len(values)
        return values + [make([batch, places], INT64.code, self.device) for _ in range(reduced)]


def lengthen(values: Sequence[Any], larger: Sequence[Any], dtype: str, device: str) -> None:
    """Copy keys and values to the front of memory with more places, without passing through the host.

    ONNX Runtime copies them, with a node that takes every type on every provider; NumPy has neither bf16 nor the memory
    of a GPU.

    Args:
        values: ONNX Runtime's own [batch, heads, places, size].
        larger: As many, with more places. What follows the copies is undefined.
        dtype: fp32, fp16 or bf16.
        device: `cpu` or `cuda`.
    """
    batch, heads, places, size = larger[0].shape()
    shape = [batch, heads, places - values[0].shape()[2], size]
    behind = onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, of_weights(dtype).code, device)
    session = _joining(dtype, device)
    for old, new in zip(values, larger, strict=True):
        binding = session.io_binding()
        binding.bind_ortvalue_input("front", old)
        binding.bind_ortvalue_input("behind", behind)
        binding.bind_ortvalue_output("joined", new)
        session.run_with_iobinding(binding)


@cache
def _joining(dtype: str, device: str) -> Any:
    """Return a session of one node, which joins tensors [batch, heads, places, size] along the places."""
    model = one_node_model("Concat", ("front", "behind"), "joined", of_weights(dtype).code, 4, {"axis": 2})
    return onnxruntime().InferenceSession(model, session_options(threads=1), providers=[PROVIDERS[device]])


class Cache:
    """Keys and values of all layers (and slots of reduced ones) on the model's device; each step makes new ones.

    Attributes:
        layout: Layout of the model's caches.
        batch: Number of sequences.
        values: ONNX Runtime's values, in the order of the model's inputs.
        length: Tokens that the model has read; reduced layers store fewer.
    """

    def __init__(self, layout: CacheLayout, batch: int) -> None:
        self.layout = layout
        self.batch = batch
        self.values = layout.empty(batch, 0)
        self.length = 0

    def bind(self, session: Any, outputs: Sequence[str], tokens: int, device: str = "cpu") -> Any:
        """Return a binding of `outputs`, left on `device`, then of past and present, for a step of `tokens` tokens."""
        binding = session.io_binding()
        for name in outputs:
            binding.bind_output(name, device)
        for name, value in zip(self.layout.past, self.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self.layout.present:
            binding.bind_output(name, self.layout.device)
        return binding

    def advance(self, present: Sequence[Any], tokens: int) -> None:
        """Take the `present` values of a step."""
        self.values = list(present)
        self.length += tokens

    def saved(self) -> float:
        """Return the share of keys that reduced layers do not store; in a batch, that of the longest sequence."""
        layers = self.layout.layers
        stored = sum(int(value.shape()[2]) for value in self.values[: 2 * layers : 2])
        return 1 - stored / (layers * self.length) if self.length else 0.0


class PlacedCache(Cache):
    """A cache with room for more tokens than it holds: a step writes the new ones and moves nothing.

    Past and present are the same memory, which only the native RoutedAttention can write to. When the room is used up
    it doubles, up to the model's context.

    Attributes:
        places: Number of tokens that fit.
    """

    places = 0
    _binding: Any = None

    def bind(self, session: Any, outputs: Sequence[str], tokens: int, device: str = "cpu") -> Any:
        """Return the binding of this cache's memory; a new one only if the memory is new."""
        if self.length + tokens > self.places:
            self._reserve(self.length + tokens)
            self._binding = None
        if self._binding is None:
            self._binding = session.io_binding()
            for name in outputs:
                self._binding.bind_output(name, device)
            for past, present, value in zip(self.layout.past, self.layout.present, self.values, strict=True):
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)
        else:
            for name in outputs:  # their shapes may change from step to step
                self._binding.bind_output(name, device)
        return self._binding

    def advance(self, present: Sequence[Any], tokens: int) -> None:
        """Count the new tokens; they were written already."""
        self.length += tokens

    def saved(self) -> float:
        """Return 0: every token is stored."""
        return 0.0

    def _reserve(self, needed: int) -> None:
        wanted = max(needed + _STEP, 2 * self.places)
        if self.layout.context is not None:
            wanted = max(needed, min(wanted, self.layout.context))
        # One place more than needed: a full cache could not be told from one that grows.
        places = (wanted // _STEP + 1) * _STEP
        try:
            kept, larger = self.layout.spare.pop()  # at once: another thread may want it too
        except IndexError:
            kept, larger = 0, []
        if kept >= places and larger[0].shape()[0] == self.batch:
            places = kept
        else:
            del larger
            larger = self.layout.empty(self.batch, places)
        if self.length:
            lengthen(self.values, larger, self.layout.dtype, self.layout.device)
        self.values, self.places = larger, places

    def __del__(self) -> None:
        """Leave the memory to the next cache: memory that is new to the process is slow when first touched."""
        if self.places:
            self.layout.spare[:] = [(self.places, self.values)]
