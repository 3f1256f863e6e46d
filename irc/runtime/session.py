"""Runs an ONNX folder on ONNX Runtime: the best provider that really loads, IO binding, the cache handed on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters.onnx import PAST, PRESENT
from irc.dtypes import LONG_NAMES
from irc.errors import InputError
from irc.files.untrusted import first_line
from irc.runtime.additions import DIFFERENCES, FIRST, FORCED, add_decisions, add_first_token
from irc.runtime.cache import PROVIDERS, TYPE_NAMES, Cache, CacheLayout, PlacedCache, onnxruntime, session_options
from irc.runtime.check import check_decisions, read_model
from irc.runtime.folder import MANIFEST, OnnxFolder, open_folder
from irc.runtime.native import CHOICES, NativeLibrary, choose_library, load_library

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one call of the model gave.

    Attributes:
        logits: float32 [batch, tokens, vocabulary]; one token where only the last was asked for.
        execute: bool [units, batch, tokens], true where a unit ran; no units for a dense model.
        difference: float32 [units, batch, tokens], execute logit minus approximate logit.
    """

    logits: NDArray[np.float32]
    execute: NDArray[np.bool_]
    difference: NDArray[np.float32]


class Runtime:
    """An ONNX Runtime session of an exported model.

    Args:
        folder: What `irc export` wrote.
        provider: `auto`, `cpu` or `cuda`.
        threads: Of one operator; 0 leaves it to ONNX Runtime.
        forced: Whether `step` is given the decisions instead of following the routers, which run all the same.
        ops: Kernels of the operators of domain `irc`: `auto`, `native`, `portable` or a library's path, as
            `irc.runtime.native.choose_library` has them.
        profile: Where ONNX Runtime writes what each kernel took (see `end_profile`); None for no profile.
        tf32: Whether ONNX Runtime may round what products of fp32 read to ten bits on CUDA, as it does by default;
            native operators never do.

    Raises:
        InputError: The folder is damaged, or the provider or the library does not load or lacks the model's data type.
    """

    def __init__(
        self,
        folder: Path,
        provider: str = "auto",
        threads: int = 0,
        forced: bool = False,
        ops: str = "auto",
        profile: Path | None = None,
        tf32: bool = True,
    ) -> None:
        self.exported: OnnxFolder = open_folder(folder)
        self.provider = choose_provider(provider)
        if self.provider == "cpu" and self.exported.dtype == "bf16":
            raise InputError(f"{folder}: ONNX Runtime's CPU provider cannot run bf16; export with --dtype fp32 or fp16")
        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.exported.model.parent.resolve())
        )
        library = self._registered(options, ops)
        self.ops = "native" if library else "portable"
        model, routed_attention = _additions(self.exported, forced)
        exact = self.provider == "cuda" and not tf32
        how: Any = (PROVIDERS["cuda"], {"use_tf32": "0"}) if exact else PROVIDERS[self.provider]
        try:
            self._session = onnxruntime().InferenceSession(model, options, providers=[how])
        except Exception as error:
            raise InputError(f"{folder}: ONNX Runtime cannot load it ({first_line(error, 300)})") from error
        self._forced = forced and bool(self.exported.decisions)
        self._layout = self._checked_cache(folder)
        self.vocabulary = self._read_vocabulary(folder)
        self._outputs = ["logits", *([DIFFERENCES] if self.exported.decisions else [])]
        can = library is not None and library.cache_with_room and self.exported.counts_past_by_mask
        self.in_place = can and routed_attention == self._layout.layers

    def _registered(self, options: Any, ops: str) -> NativeLibrary | None:
        """Register the kernels that `ops` asks for; a model without routed units has no operator of ours."""
        if not self.exported.decisions:
            if ops not in CHOICES:
                load_library(Path(ops))  # of no use here, but what is no library is refused all the same
            return None
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

    def _checked_cache(self, folder: Path) -> CacheLayout:
        """Hold the model's cache against what `irc.json` says of it."""
        cache, dtype = self.exported.cache, self.exported.dtype
        inputs = [value for value in self._session.get_inputs() if value.name.startswith(PAST)]
        found = {value.name: value.shape for value in inputs}
        described = 2 * cache.layers + len(cache.reduced)
        if len(found) != described:
            raise InputError(
                f"{folder}: the model has {len(found)} cache inputs, irc.json describes {described}; export again"
            )
        names = [f"{layer}.{part}" for layer in range(cache.layers) for part in ("key", "value")]
        names += [f"{layer}.slots" for layer in cache.reduced]
        past, present = ([f"{stem}.{name}" for name in names] for stem in (PAST, PRESENT))
        outputs = {value.name for value in self._session.get_outputs()}
        shapes = [found[name] for name in past[: 2 * cache.layers] if name in found]
        if (
            found.keys() != set(past)
            or not outputs.issuperset(["logits", *present])
            or any(len(shape) != 4 or [shape[1], shape[3]] != [cache.heads, cache.size] for shape in shapes)
        ):
            raise InputError(f"{folder}: the model's cache is not the one that irc.json describes; export again")
        expected = dict.fromkeys(past[: 2 * cache.layers], LONG_NAMES[dtype])
        for value in inputs:
            name, taken = value.name, TYPE_NAMES.get(value.type, value.type)
            if taken != expected.get(name, "int64"):
                raise InputError(
                    f"{folder / MANIFEST}: says {dtype}, the model takes {taken} for {name}: damaged; export again"
                )
        context = self.exported.manifest.get("context_length")
        return CacheLayout(past, present, cache.layers, cache.heads, cache.size, dtype, self.provider, context)

    def _read_vocabulary(self, folder: Path) -> int:
        """Return how many ids the model knows, as many as it has logits."""
        (shape,) = (value.shape for value in self._session.get_outputs() if value.name == "logits")
        if len(shape) != 3 or not isinstance(shape[2], int):
            raise InputError(f"{folder}: the model does not say how many logits a token has; export again")
        return shape[2]

    @property
    def device(self) -> str:
        """Where the cache lies: `cpu` or `cuda`."""
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
            last: Whether logits are of the last token alone, [batch, 1, vocabulary]: the head then reads no other.

        Raises:
            InputError: Ids or mask are no such arrays, an id is outside the vocabulary, the shapes do not fit the cache
                or the decisions, or there is no sequence or no token.
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
            raise InputError("execute is given, but this runtime follows the routers; make it with forced=True")
        binding = cache.bind(self._session, self._outputs, ids.shape[1], "cpu" if fetch else self.provider)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input(FIRST, np.array([ids.shape[1] - 1 if last else 0]))
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


def choose_provider(wanted: str) -> str:
    """Return `cpu` or `cuda`; `auto` is cuda where it really loads.

    Raises:
        InputError: CUDA was asked for and does not load; the message says why.
    """
    if wanted not in ("auto", *PROVIDERS):
        raise InputError(f"provider is '{wanted}'; choose from auto, {', '.join(PROVIDERS)}")
    if wanted == "cpu":
        return "cpu"
    listed = PROVIDERS["cuda"] in onnxruntime().get_available_providers()
    if not listed:
        if wanted == "cuda":
            raise InputError(
                "provider is 'cuda', but this ONNX Runtime is built without CUDA; install onnxruntime-gpu in its place"
            )
        return "cpu"
    from irc.runtime.environment import probe_provider

    found = probe_provider(PROVIDERS["cuda"])
    if found.usable:
        onnxruntime().preload_dlls()
        return "cuda"
    if wanted == "cuda":
        raise InputError(f"provider is 'cuda', but it does not load: {found.reason}")
    return "cpu"


def _additions(exported: OnnxFolder, forced: bool) -> tuple[bytes, int]:
    """Return the model with what this runtime adds to it, and how many RoutedAttention it has.

    Its weights stay in their file.
    """
    try:
        model = read_model(exported.model, exported.weights)
        check_decisions(model.graph, exported.decisions, exported.folder / MANIFEST)
        add_decisions(model.graph, exported.decisions, forced)
        add_first_token(model.graph)
        return model.SerializeToString(), sum(node.op_type == "RoutedAttention" for node in model.graph.node)
    except UnicodeDecodeError as error:  # names are decoded when they are read
        raise InputError(f"{exported.model}: damaged (a name in it is no text: {error}); export again") from error


def _check_whole(name: str, given: Any, kinds: str, shape: str) -> None:
    """Refuse what is no array of two dimensions and one of NumPy's kinds of whole numbers."""
    array = isinstance(given, np.ndarray)
    if not array or given.ndim != 2 or given.dtype.kind not in kinds:
        found = f"{given.dtype} {list(given.shape)}" if array else type(given).__name__
        raise InputError(f"{name}: given {found}, expected a NumPy array of whole numbers {shape}, such as int64")


def _float32(value: Any) -> NDArray[np.float32]:
    if value.element_type() == onnx.TensorProto.BFLOAT16:
        import torch.utils.dlpack

        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).float().numpy()
    array: NDArray[np.float32] = value.numpy().astype(np.float32, copy=False)
    return array
