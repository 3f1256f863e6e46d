"""Runs an ONNX folder on ONNX Runtime: checks that the model is the one described, binds inputs, hands on the cache."""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx_dtypes import BF16, INT64, of_weights
from exporters.onnx_format import (
    DIFFERENCES,
    FIRST,
    FORCED,
    IN_PLACE,
    MANIFEST,
    PAST,
    PRESENT,
    UNITS,
    Decision,
)
from irc.errors import InputError
from irc.files.untrusted import first_line
from irc.runtime.cache import Cache, CacheLayout, PlacedCache
from irc.runtime.folder import OnnxFolder, open_folder
from irc.runtime.native import NativeLibrary, choose_library
from irc.runtime.provider import PROVIDERS, choose_provider, onnxruntime, session_options

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """The results of one call of the model.

    Attributes:
        logits: float32 [batch, tokens, vocabulary]; one token if only the last was asked for.
        execute: bool [units, batch, tokens], true where a unit ran; no units for a dense model.
        difference: float32 [units, batch, tokens], execute logit minus approximate logit.
    """

    logits: NDArray[np.float32]
    execute: NDArray[np.bool_]
    difference: NDArray[np.float32]


@dataclass(frozen=True)
class _Signature:
    """What a session says of its model.

    Attributes:
        inputs: (type, sizes) by name, in the model's order.
        outputs: The same.
        optional: Names of inputs with a default.
        metadata: Texts by name.
    """

    inputs: Mapping[str, tuple[str, Sequence[int | str | None]]]
    outputs: Mapping[str, tuple[str, Sequence[int | str | None]]]
    optional: frozenset[str]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, session: Any) -> _Signature:
        """Read it off a session."""
        inputs, outputs = (
            {value.name: (value.type, value.shape) for value in values}
            for values in (session.get_inputs(), session.get_outputs())
        )
        optional = frozenset(value.name for value in session.get_overridable_initializers())
        return cls(inputs, outputs, optional, dict(session.get_modelmeta().custom_metadata_map))


class Runtime:
    """An ONNX Runtime session of an exported model.

    Args:
        folder: The output of `irc export`.
        provider: `auto`, `cpu` or `cuda`.
        threads: Threads of one operator; 0 leaves it to ONNX Runtime.
        ops: Kernels of the operators of domain `irc`: `auto`, `native`, `portable` or a library's path, as
            `irc.runtime.native.choose_library` takes them.
        profile: Where ONNX Runtime writes how long each kernel took (see `end_profile`); None for no profile.
        tf32: Whether ONNX Runtime may round the inputs of fp32 products to ten bits on CUDA, as it does by default;
            native operators never do.
        model_file: A model to run in place of the folder's, with the folder's weights: what
            `irc.deployment.changed` wrote for it. It is read once, here.
        forced: Whether that model is a forced one; `step` is then given the decisions instead of following the
            routers, which run all the same.

    Raises:
        InputError: The folder is damaged or of an older format, or the provider or the library does not load or lacks
            the model's data type.
    """

    def __init__(
        self,
        folder: Path,
        provider: str = "auto",
        threads: int = 0,
        ops: str = "auto",
        profile: Path | None = None,
        tf32: bool = True,
        model_file: Path | None = None,
        forced: bool = False,
    ) -> None:
        self.exported: OnnxFolder = open_folder(folder)
        self.provider = choose_provider(provider)
        dtype = of_weights(self.exported.dtype)
        if self.provider == "cpu" and not dtype.on_cpu:
            raise InputError(f"{folder}: ONNX Runtime's CPU provider cannot run {dtype.short}; export as fp32 or fp16")
        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        library = self._registered(options, ops)
        self.ops = "native" if library else "portable"
        exact = self.provider == "cuda" and not tf32
        how: Any = (PROVIDERS["cuda"], {"use_tf32": "0"}) if exact else PROVIDERS[self.provider]
        model: str | bytes = str(self.exported.model)
        if model_file is not None:
            model = model_file.read_bytes()  # its weights are the folder's, beside which it does not lie
            weights = str(self.exported.model.parent.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
        try:
            self._session = onnxruntime().InferenceSession(model, options, providers=[how])
            signature = _Signature.of(self._session)
        except Exception as error:
            raise InputError(
                f"{folder}: ONNX Runtime cannot load it ({first_line(error, 300)}); export again"
            ) from error
        _check_units(self.exported, signature)
        self._forced = forced and bool(self.exported.decisions)
        self._layout = _cache_layout(self.exported, signature, self.provider)
        self.vocabulary = _vocabulary(folder, signature)
        self._outputs = ["logits", *([DIFFERENCES] if self.exported.decisions else [])]
        can = library is not None and library.cache_with_room and self.exported.counts_past_by_mask
        self.in_place = can and signature.metadata.get(IN_PLACE) == "true"

    def _registered(self, options: Any, ops: str) -> NativeLibrary | None:
        """Register the kernels that `ops` asks for."""
        library = choose_library(ops, self.provider, self.exported.dtype)
        if library is None:
            return None
        try:
            options.register_custom_ops_library(str(library.path))
        except Exception as error:
            reason = f"{library.path}: ONNX Runtime cannot register it ({first_line(error, 300)})"
            if ops != "auto":
                raise InputError(reason) from error
            log.warning("native operators are not used, portable ones are: %s", reason)
            return None
        return library

    @property
    def device(self) -> str:
        """Device of the cache: `cpu` or `cuda`."""
        return self.provider

    def end_profile(self) -> Path:
        """End the profile; return ONNX Runtime's trace (JSON)."""
        return Path(self._session.end_profiling())

    def empty_cache(self, batch: int) -> Cache:
        """Return the cache of a text that has not begun."""
        return (PlacedCache if self.in_place else Cache)(self._layout, batch)

    def step(
        self,
        ids: NDArray[np.integer[Any]],
        mask: NDArray[np.integer[Any] | np.bool_],
        cache: Cache,
        execute: NDArray[np.bool_] | None = None,
        *,
        fetch: bool = True,
        last: bool = False,
    ) -> Step:
        """Run the model on new tokens; the cache grows in place.

        Args:
            ids: [batch, tokens], of any type of whole numbers; the model reads them as int64.
            mask: [batch, cached + tokens], 0 on padding; of whole numbers or bool.
            cache: Of the tokens before.
            execute: Decisions [units, batch, tokens] of a forced runtime.
            fetch: Whether results are brought to the host; otherwise they stay on the device and the step holds none.
            last: Whether to return logits of the last token alone, [batch, 1, vocabulary]; the head then reads no
                other token.

        Raises:
            InputError: Ids or mask are not such arrays, an id is outside the vocabulary, the shapes do not fit the
                cache or the decisions, or there is no sequence or no token.
        """
        _check_whole("ids", ids, "iu", "[batch, tokens]")
        _check_whole("mask", mask, "iub", "[batch, cached + tokens]")
        if not ids.size:
            raise InputError(f"ids are {list(ids.shape)}: a step needs a sequence and a token at least")
        if mask.shape != (len(ids), cache.length + ids.shape[1]) or len(ids) != cache.batch:
            raise InputError(
                f"ids are {list(ids.shape)}, the mask {list(mask.shape)}; the cache holds {cache.length} tokens of "
                f"{cache.batch} sequences"
            )
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self.vocabulary:
            wrong = smallest if smallest < 0 else largest
            raise InputError(f"ids hold {wrong}; the model's vocabulary has the ids 0 to {self.vocabulary - 1}")
        ids, mask = ids.astype(np.int64, copy=False), mask.astype(np.int64, copy=False)
        units = len(self.exported.decisions)
        if self._forced and (execute is None or execute.shape != (units, *ids.shape) or execute.dtype != np.bool_):
            given = "missing" if execute is None else f"{execute.dtype} {list(execute.shape)}"
            raise InputError(f"execute is {given}; a forced runtime is told all decisions, bool {[units, *ids.shape]}")
        if execute is not None and not self._forced and units:
            raise InputError("execute is given, but this runtime follows the routers; use a forced runtime")
        binding = cache.bind(self._session, self._outputs, ids.shape[1], "cpu" if fetch else self.provider)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        first = np.array([ids.shape[1] - 1 if last else 0])
        # By name alone ONNX Runtime finds no input that has a default.
        binding.bind_ortvalue_input(FIRST, onnxruntime().OrtValue.ortvalue_from_numpy(first))
        if self._forced and execute is not None:
            forced = np.where(execute, np.float32(1), np.float32(-1)).reshape(-1, ids.shape[1])
            binding.bind_cpu_input(FORCED, forced)
        self._session.run_with_iobinding(binding)
        logits, *rest = binding.get_outputs()
        found = rest.pop(0) if self.exported.decisions else None
        cache.advance(rest, ids.shape[1])
        difference = np.zeros((0, *ids.shape), np.float32)
        if not fetch:
            return Step(np.zeros((0, 0, 0), np.float32), difference < 0, difference)
        if found is not None:
            difference = found.numpy().reshape(-1, *ids.shape)
        return Step(_float32(logits), ~(difference < 0) if execute is None else execute, difference)


def _check_units(exported: OnnxFolder, signature: _Signature) -> None:
    """Compare the routed units in the manifest with those in the model's own metadata.

    Raises:
        InputError: The manifest lists a unit twice or one that the model does not have, leaves one out, or has another
            order; or the model does not say what its units are.
    """
    path = exported.folder / MANIFEST
    try:
        routed = [Decision(*map(str, pair)) for pair in json.loads(signature.metadata[UNITS])]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{exported.model}: does not name its routed units; export again") from error
    listed = exported.decisions
    for decision in listed:
        name = f"{path}: unit {decision.unit[:80]}"
        if decision not in routed:
            raise InputError(f"{name} is not one that the model routes; export again")
        if listed.count(decision) > 1:
            raise InputError(f"{name} is listed twice; export again")
    if left := [decision.unit[:80] for decision in routed if decision not in listed]:
        counts = f"{len(listed)} of the model's {len(routed)} routed units"
        raise InputError(f"{path}: lists {counts}, {left[0]} is missing; export again")
    if listed != routed:
        raise InputError(f"{path}: lists the units in another order than the model; export again")


def _cache_layout(exported: OnnxFolder, signature: _Signature, provider: str) -> CacheLayout:
    """Compare the model's inputs and outputs with what the manifest says of its cache."""
    folder, cache, dtype = exported.folder, exported.cache, exported.dtype
    found = {name: value for name, value in signature.inputs.items() if name.startswith(PAST)}
    described = 2 * cache.layers + len(cache.reduced)
    if len(found) != described:
        raise InputError(
            f"{folder}: the model has {len(found)} cache inputs, {MANIFEST} describes {described}; export again"
        )
    names = [f"{layer}.{part}" for layer in range(cache.layers) for part in ("key", "value")]
    names += [f"{layer}.slots" for layer in cache.reduced]
    past, present = ([f"{stem}.{name}" for name in names] for stem in (PAST, PRESENT))
    keys = past[: 2 * cache.layers]
    shapes = [shape for name, (_, shape) in found.items() if name in keys]
    if found.keys() != set(past) or any(
        len(shape) != 4 or [shape[1], shape[3]] != [cache.heads, cache.size] for shape in shapes
    ):
        raise InputError(f"{folder}: the model's cache is not the one that {MANIFEST} describes; export again")
    added = [DIFFERENCES] if exported.decisions else []
    if not signature.outputs.keys() >= {"logits", *present, *added} or FIRST not in signature.optional:
        raise InputError(f"{folder}: the model lacks inputs or outputs that irc export writes; export again")
    for name, (kind, _) in found.items():
        if kind != (of_weights(dtype) if name in keys else INT64).text:
            raise InputError(f"{folder / MANIFEST}: says {dtype}, but the model takes {kind} for {name}; export again")
    context = exported.manifest.get("context_length")
    return CacheLayout(past, present, cache.layers, cache.heads, cache.size, dtype, provider, context)


def _vocabulary(folder: Path, signature: _Signature) -> int:
    """Return how many ids the model knows: the number of logits of a token."""
    _, shape = signature.outputs["logits"]
    if len(shape) != 3 or not isinstance(shape[2], int):
        raise InputError(f"{folder}: the model does not say how many logits a token has; export again")
    return shape[2]


def _check_whole(name: str, given: Any, kinds: str, shape: str) -> None:
    """Refuse anything but an array of two dimensions and one of NumPy's kinds of whole numbers."""
    array = isinstance(given, np.ndarray)
    if not array or given.ndim != 2 or given.dtype.kind not in kinds:
        found = f"{given.dtype} {list(given.shape)}" if array else type(given).__name__
        raise InputError(f"{name}: given {found}, expected a NumPy array of whole numbers {shape}, such as int64")


def _float32(value: Any) -> NDArray[np.float32]:
    """Return a value in host memory as float32."""
    if value.element_type() == BF16.code:  # NumPy has no such type; its bits are the upper half of a float32's
        shape = value.shape()
        halves = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
        return (np.ctypeslib.as_array(halves).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    array: NDArray[np.float32] = value.numpy().astype(np.float32, copy=False)
    return array
