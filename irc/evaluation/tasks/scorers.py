"""What gives logits to a harness: a PyTorch model, dense or routed, or an ONNX folder. Padding counts nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from irc.model.modules import Mode, Record
from irc.model.routed import RoutedForCausalLM
from irc.runtime.generation import Generator, Sampling


class Scorer(Protocol):
    """A model that a harness can ask.

    Attributes:
        tokenizer: Its Hugging Face tokenizer.
        context: Tokens that it can read at most.
        executed: Executed (real token, unit) pairs so far.
        pairs: All (real token, unit) pairs so far.
    """

    tokenizer: Any
    context: int
    executed: int
    pairs: int

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [batch, tokens, vocabulary] for ids [batch, tokens] and a mask, 0 on padding."""
        ...

    def continue_text(self, prompt: str, stop: Sequence[str], most: int) -> str:
        """Return the greedy continuation of a text, up to a stop string or `most` tokens."""
        ...


class TorchScorer:
    """A captured model.

    Args:
        model: Plain, or rewritten.
        mode: `route`, or `execute` for the dense model in a rewritten one.
    """

    def __init__(self, model: RoutedForCausalLM, mode: Mode) -> None:
        self.model, self.mode = model, mode
        self.tokenizer: Any = model.facts["base"].tokenizer
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)
        self.executed = self.pairs = 0

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        tape: dict[str, Record] = {}
        device = self.model.device
        with self.model.control.using(mode=self.mode, tape=tape):
            found = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        real = mask.bool().to(device)
        self.executed += sum(int((record.execute & real).sum()) for record in tape.values())
        self.pairs += len(tape) * int(real.sum())
        logits: torch.Tensor = found.float().cpu()
        return logits

    def continue_text(self, prompt: str, stop: Sequence[str], most: int) -> str:
        """See `Scorer`."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][:, -(self.context - most) :]
        with self.model.control.using(mode=self.mode):
            made = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids, device=self.model.device),
                max_new_tokens=most,
                do_sample=False,
            )
        text: str = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return cut(text, stop)


class OnnxScorer:
    """An exported model.

    Args:
        generator: Its runtime with tokenizer.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self.context = int(generator.runtime.exported.manifest.get("context_length") or 2048)
        self.executed = self.pairs = 0

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        runtime = self.generator.runtime
        step = runtime.step(ids.numpy(), mask.numpy().astype(np.int64), runtime.empty_cache(len(ids)))
        real = mask.bool().numpy()
        self.executed += int((step.execute & real).sum())
        self.pairs += len(step.execute) * int(real.sum())
        return torch.from_numpy(step.logits)

    def continue_text(self, prompt: str, stop: Sequence[str], most: int) -> str:
        """See `Scorer`."""
        ids = self.tokenizer(prompt)["input_ids"]
        room = self.context - most
        if len(ids) > room:
            prompt = self.tokenizer.decode(ids[-room:])
        made = self.generator.generate(prompt, max_tokens=most, sampling=Sampling(), stop=list(stop))
        self.executed += made.executed
        self.pairs += made.pairs
        return made.text


def cut(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings."""
    places = [text.find(mark) for mark in stop if mark and mark in text]
    return text[: min(places)] if places else text
