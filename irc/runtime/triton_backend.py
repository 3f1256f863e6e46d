"""Text on Triton Inference Server: its Python backend runs this for the model `irc_text` of an exported repository.

Triton itself bounds the queue, rejects requests that waited too long, and ends those whose client has gone. A request's
inputs are the prompt and any of the options of `irc generate` (`REQUEST_OPTIONS`).
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx_format import REQUEST_OPTIONS
from irc.errors import InputError
from irc.runtime.generation import Generated, Generator, Sampling
from irc.runtime.session import Runtime

log = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


class TritonPythonModel:
    """One instance: a session and its tokenizer. Triton makes it and calls its methods, whose names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the ONNX folder, which is the repository that holds this model.

        Raises:
            InputError: The folder is damaged; Triton prints it and does not load the model.
        """
        self._triton: Any = importlib.import_module("triton_python_backend_utils")  # in Triton's own process alone
        self._generator = Generator(Runtime(Path(args["model_repository"]).resolve().parent))

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request: piece by piece if it sets `stream`, else once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except InputError as error:
                self._fail(sender, str(error))
            except Exception as error:
                log.exception("a request failed")
                self._fail(sender, f"{type(error).__name__}: {error}")

    def _answer(self, request: Any, sender: Any) -> None:
        for name in json.loads(request.parameters() or "{}"):
            if not name.startswith("triton_"):
                raise InputError(f"{name} is not an option; choose from {', '.join(REQUEST_OPTIONS)}")
        given = {tensor.name(): _values(tensor) for tensor in request.inputs()}
        prompt, stop = given.pop("prompt")[0], given.pop("stop", [])
        options = {name: values[0] for name, values in given.items()}
        stream, most = bool(options.get("stream", False)), int(options.get("max_tokens", 128))
        if most < 1:
            raise InputError(f"max_tokens is {most}; give 1 or more")

        def emit(piece: str) -> None:
            if sender.is_cancelled():
                raise KeyboardInterrupt  # the generator ends the text, as it does for Ctrl-C
            if stream and piece:
                sender.send(self._response(piece, "", 0.0))

        sampling = Sampling(**{name: options[name] for name in _SAMPLING if name in options})
        result: Generated = self._generator.generate(
            _text(prompt), max_tokens=most, sampling=sampling, stop=[_text(mark) for mark in stop], emit=emit
        )
        last = self._response("" if stream else result.text, result.stopped, result.skipped)
        sender.send(last, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, text: str, stopped: str, skipped: float) -> Any:
        tensors = (
            ("text", np.array([[text.encode()]], dtype=object)),
            ("stopped", np.array([[stopped.encode()]], dtype=object)),
            ("skipped", np.array([[skipped]], dtype=np.float32)),
        )
        return self._triton.InferenceResponse([self._triton.Tensor(name, value) for name, value in tensors])

    def _fail(self, sender: Any, reason: str) -> None:
        error = self._triton.InferenceResponse(error=self._triton.TritonError(reason))
        sender.send(error, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _values(tensor: Any) -> list[Any]:
    values: list[Any] = tensor.as_numpy().ravel().tolist()
    return values


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not valid UTF-8 (byte {error.start}); give text") from error
