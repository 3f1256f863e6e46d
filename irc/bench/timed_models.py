"""The models to time, behind one interface: each reads tokens with a cache and leaves the logits on its device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.onnx_dtypes import of_weights
from irc.dtypes import torch_dtype
from irc.runtime.provider import PROVIDERS, onnxruntime, session_options
from irc.runtime.session import Runtime

Ids = NDArray[np.int64]


class TimedModel(Protocol):
    """A model that can be timed."""

    def empty(self, batch: int) -> Any:
        """Return the state before the first token, for a number of sequences."""

    def step(self, ids: Ids, state: Any, execute: NDArray[np.bool_] | None) -> Any:
        """Read tokens that follow those of a state.

        Args:
            ids: int64 [batch, tokens].
            state: What `empty` or the step before returned.
            execute: What a model with forced decisions executes, bool [units, batch, tokens]. Others ignore it.

        Returns:
            The new state.
        """


class ExportedModel:
    """A folder that `irc export` wrote.

    Args:
        runtime: Session of the folder.
        forced: Whether the session follows `execute` instead of its routers.
    """

    def __init__(self, runtime: Runtime, forced: bool) -> None:
        self.runtime = runtime
        self.forced = forced

    def empty(self, batch: int) -> Any:
        """Return an empty cache."""
        return self.runtime.empty_cache(batch)

    def step(self, ids: Ids, state: Any, execute: NDArray[np.bool_] | None) -> Any:
        """Run the session; the cache grows in place."""
        mask = np.ones((len(ids), state.length + ids.shape[1]), np.int64)
        self.runtime.step(ids, mask, state, execute if self.forced else None, fetch=False)
        return state

    def routes(self, ids: Ids, state: Any) -> NDArray[np.bool_]:
        """Return what the routers decide to execute, bool [units, batch, tokens]. Not for timing."""
        mask = np.ones((len(ids), state.length + ids.shape[1]), np.int64)
        return self.runtime.step(ids, mask, state).execute


class TransformersModel:
    """The dense model in Hugging Face transformers, eager or compiled.

    Args:
        base: Folder of the model.
        dtype: fp32, fp16 or bf16.
        device: cpu or cuda.
        compiled: Whether torch.compile wraps its forward pass.
    """

    def __init__(self, base: Path, dtype: str, device: str, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch_dtype(dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model = model.to(device).eval()
        self._torch, self._device = torch, device
        self._forward = torch.compile(model, dynamic=True) if compiled else model

    def empty(self, batch: int) -> Any:
        """Return None, because transformers creates the cache."""

    def step(self, ids: Ids, state: Any, execute: NDArray[np.bool_] | None) -> Any:
        """Run the model and, on a GPU, wait until it is done."""
        with self._torch.inference_mode():
            tokens = self._torch.from_numpy(ids).to(self._device)
            cache = self._forward(tokens, past_key_values=state, use_cache=True).past_key_values
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        return cache


class GenaiModel:
    """A model that onnxruntime-genai's model builder wrote, run on ONNX Runtime like our own models.

    Args:
        folder: Folder with `model.onnx` and `genai_config.json`.
        provider: cpu or cuda.
        dtype: Data type of the cache: fp32, fp16 or bf16.
    """

    def __init__(self, folder: Path, provider: str = "cpu", dtype: str = "fp32") -> None:
        model, options = str(folder / "model.onnx"), session_options()
        self.session = onnxruntime().InferenceSession(model, options, providers=[PROVIDERS[provider]])
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self._heads, self._size = decoder["num_key_value_heads"], decoder["head_size"]
        self._past = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._provider, self._element = provider, of_weights(dtype).code

    def empty(self, batch: int) -> Any:
        """Return empty keys and values."""
        make = onnxruntime().OrtValue.ortvalue_from_shape_and_type
        shape = [batch, self._heads, 0, self._size]
        return [make(shape, self._element, self._provider) for _ in self._past]

    def step(self, ids: Ids, state: Any, execute: NDArray[np.bool_] | None) -> Any:
        """Run the session and return the new keys and values."""
        return self.run(ids, state)[1:]

    def run(self, ids: Ids, past: Any) -> list[Any]:
        """Return the logits and the new keys and values, all in ONNX Runtime's memory.

        Args:
            ids: int64 [batch, tokens].
            past: Keys and values so far.
        """
        binding = self.session.io_binding()
        length = past[0].shape()[2] + ids.shape[1]
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((len(ids), length), np.int64))
        for name, tensor in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, tensor)
        for name in ("logits", *self._present):
            binding.bind_output(name, self._provider)
        self.session.run_with_iobinding(binding)
        results: list[Any] = binding.get_outputs()
        return results
