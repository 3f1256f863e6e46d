"""The texts that a model is measured on beside its main one: the yardstick that ships with irc, and texts of the user.

The yardstick is never trained on, never sets a threshold and never chooses a setting. See `yardstick/LICENCE.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from irc.errors import InputError
from irc.evaluation.figures import text_figures
from irc.evaluation.perplexity import evaluate
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.text.source import Document, load_text, pick, token_stream, windows

_LONG_WINDOW = 4096
_SHORTEST_LONG = 2  # times the usual window; below, the context is too short for a long text to say anything new


@dataclass(frozen=True)
class NamedText:
    """A text to measure on.

    Attributes:
        name: What tables and JSON call it.
        windows: int64 [windows, tokens].
    """

    name: str
    windows: torch.Tensor


def further_texts(base: BaseModel, seq_len: int, tokens: int, also: Sequence[str] = ()) -> list[NamedText]:
    """Read the yardstick, and texts of the user.

    Args:
        base: Its tokenizer reads the texts; one with a chat template sees the dialogues through it.
        seq_len: Tokens per window. A long text is read in windows of 4,096, or of the model's context if it is shorter.
        tokens: Tokens to read of each text; 0 leaves the yardstick out and reads the user's texts whole.
        also: Texts of the user, each `NAME=TEXT`.

    Raises:
        InputError: One of the user's texts cannot be read, or is shorter than a window.
    """
    tokenizer: Any = base.tokenizer
    found = []
    for name, text in (_named(one) for one in also):
        stream = token_stream(load_text(text).documents, tokenizer)
        found.append(NamedText(name, pick(windows(stream, seq_len, f"{name}={text}"), tokens)))
    if not tokens:
        return found
    context = getattr(base.config, "max_position_embeddings", None) or _LONG_WINDOW
    for name, documents in _yardstick(tokenizer):
        stream = token_stream(documents, tokenizer)
        if len(stream) >= seq_len:  # a tokenizer with very long tokens may leave less
            found.append(NamedText(name, pick(windows(stream, seq_len), tokens)))
        length = min(_LONG_WINDOW, context, len(stream))
        if name == "prose" and length >= _SHORTEST_LONG * seq_len:
            found.append(NamedText("long prose", windows(stream, length)[:1]))
    return found


def measure_texts(
    model: RoutedForCausalLM, texts: Sequence[NamedText], progress: ProgressFactory
) -> list[dict[str, Any]]:
    """Evaluate a model on each text; returns the objects of the JSON key `texts`."""
    rows = []
    for text in texts:
        with progress(text.name, len(text.windows)) as bar:
            rows.append({"name": text.name, **text_figures(model, evaluate(model, text.windows, bar))})
    return rows


def _named(given: str) -> tuple[str, str]:
    name, mark, text = given.partition("=")
    if not (name.strip() and mark and text.strip()):
        raise InputError(f"also is '{given[:80]}'; give NAME=TEXT, such as mail=mail.txt", options=("also",))
    return name.strip(), text.strip()


def _yardstick(tokenizer: Any) -> Iterator[tuple[str, list[Document]]]:
    folder = Path(str(resources.files("irc.evaluation"))) / "yardstick"
    for name in ("prose", "code", "technical"):
        yield name, [Document(name, (folder / f"{name}.txt").read_text(encoding="utf-8"))]
    lines = (folder / "dialogue.jsonl").read_text(encoding="utf-8").splitlines()
    yield "dialogue", [_dialogue(tokenizer, json.loads(line)["messages"]) for line in lines]


def _dialogue(tokenizer: Any, messages: list[dict[str, str]]) -> Document:
    """Return a dialogue for the model's chat template, or as plain turns for a model without one."""
    turns = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in messages)
    has_template = getattr(tokenizer, "chat_template", None)
    return Document("dialogue", turns, json.dumps(messages) if has_template else "")
