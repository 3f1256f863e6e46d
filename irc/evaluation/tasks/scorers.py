"""Models as a task harness uses them: a PyTorch model, dense or routed, or an ONNX folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from irc.model.modules import Mode, Record
from irc.model.routed import RoutedForCausalLM
from irc.runtime.generation import Generator, Sampling, special_stops


class Scorer(Protocol):
    """A model that scores and continues texts.

    Attributes:
        tokenizer: Its Hugging Face tokenizer.
        context: Longest text that it can read, in tokens.
        executed: Executed (token, unit) pairs so far, without padding.
        pairs: All (token, unit) pairs so far, without padding.
    """

    tokenizer: Any
    context: int
    executed: int
    pairs: int

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch.

        Args:
            ids: int64 [batch, tokens].
            mask: int64 [batch, tokens], 0 on padding.

        Returns:
            float32 [batch, tokens, vocabulary].
        """
        ...

    def continue_text(self, prompt: str, stop: Sequence[str], max_tokens: int) -> str:
        """Return the greedy continuation of a text, up to the first stop string or `max_tokens` tokens."""
        ...


class TorchScorer:
    """A PyTorch model.

    Args:
        model: Plain or rewritten.
        mode: `route`, or `execute` for a plain model or the dense form of a rewritten one.
    """

    def __init__(self, model: RoutedForCausalLM, mode: Mode) -> None:
        self.model, self.mode = model, mode
        self.tokenizer: Any = model.base.tokenizer
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)
        self.executed = self.pairs = 0

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        tape: dict[str, Record] = {}
        device = self.model.device
        with self.model.control.using(mode=self.mode, tape=tape):
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        not_padding = mask.bool().to(device)
        self.executed += sum(int((record.execute & not_padding).sum()) for record in tape.values())
        self.pairs += len(tape) * int(not_padding.sum())
        logits: torch.Tensor = output.logits.float().cpu()
        return logits

    def continue_text(self, prompt: str, stop: Sequence[str], max_tokens: int) -> str:
        """See `Scorer`."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][:, -(self.context - max_tokens) :]
        with self.model.control.using(mode=self.mode):
            generated = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids, device=self.model.device),
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        new, ends = generated[0, ids.shape[1] :].tolist(), special_stops(self.tokenizer, stop)
        new = new[: next((index for index, token in enumerate(new) if token in ends), None)]
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return cut_at_stop(text, stop)


class OnnxScorer:
    """An exported model.

    Args:
        generator: Its runtime and tokenizer.
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
        not_padding = mask.bool().numpy()
        self.executed += int((step.execute & not_padding).sum())
        self.pairs += len(step.execute) * int(not_padding.sum())
        return torch.from_numpy(step.logits)

    def continue_text(self, prompt: str, stop: Sequence[str], max_tokens: int) -> str:
        """See `Scorer`."""
        ids = self.tokenizer.encode(prompt)
        prompt_limit = self.context - max_tokens
        if len(ids) > prompt_limit:
            prompt = self.tokenizer.decode(ids[-prompt_limit:])
        generated = self.generator.generate(prompt, max_tokens=max_tokens, sampling=Sampling(), stop=list(stop))
        self.executed += generated.executed
        self.pairs += generated.pairs
        return generated.text


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string in it."""
    ends = [text.find(mark) for mark in stop if mark and mark in text]
    return text[: min(ends)] if ends else text
