"""Mixes several texts, each with a weight, into one that is read like a single text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from irc.text.source import Document, Split, TextSource, Tokenizer, load_text, pick, token_stream, windows

log = logging.getLogger(__name__)

_SEED = 0  # of the order of the windows


@dataclass(frozen=True)
class Mixture:
    """Several texts, or a single one.

    Attributes:
        texts: The texts.
        weights: Share of the windows that each text gets, in proportion; as many as texts.
    """

    texts: tuple[TextSource, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """The names of the texts, as the user gave them."""
        return " + ".join(text.name for text in self.texts)

    @property
    def documents(self) -> list[Document]:
        """The documents of all texts."""
        return [document for text in self.texts for document in text.documents]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the texts and weights, in hexadecimal; for a single text, its own fingerprint."""
        if len(self.texts) == 1:
            return self.texts[0].fingerprint()
        parts = [[text.fingerprint(), weight] for text, weight in zip(self.texts, self._shares(), strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def split(self, split: Split) -> list[Document]:
        """Return the documents of one split of all texts."""
        return [document for text in self.texts for document in text.split(split)]

    def stream(self, split: Split | None, tokenizer: Tokenizer, length: int, enough: int = 0) -> torch.Tensor:
        """Tokenize one split of all texts, or everything.

        Of several texts, each contributes windows in proportion to its weight, in a random order that is always the
        same. The text with the fewest windows for its weight limits the number of all windows.

        Args:
            split: Name of the split; None for all documents.
            tokenizer: Tokenizer of the model.
            length: Tokens per window.
            enough: Number of tokens after which no further documents are read, in an order of their own that is always
                the same; 0 for all. There may be more tokens, and of several texts fewer.

        Returns:
            int64 [tokens]; of several texts, whole windows.
        """
        shares = self._shares()
        streams = []
        for text, share in zip(self.texts, shares, strict=True):
            documents = text.documents if split is None else text.split(split)
            streams.append(token_stream(documents, tokenizer, round(enough * share)))
        if len(streams) == 1:
            return streams[0]
        total = min(stream.numel() // length / share for stream, share in zip(streams, shares, strict=True) if share)
        found = []
        for text, stream, share in zip(self.texts, streams, shares, strict=True):
            count = round(total * share)
            log.debug("%s of %s: %d of %d windows", split, text.name, count, stream.numel() // length)
            if count:
                found.append(pick(windows(stream, length), count * length))
        if not found:
            return streams[0].new_zeros(0)
        mixed = torch.cat(found)
        return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(_SEED))].flatten()

    def _shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]


def load_texts(
    specs: Sequence[str], weights: Sequence[float] = (), load: Callable[[str], TextSource] = load_text
) -> Mixture:
    """Load the texts that the setting `data` names.

    Args:
        specs: The names.
        weights: Their weights; all count alike if there are none.
        load: Loads a text by its name.

    Raises:
        InputError: A text cannot be read.
    """
    return Mixture(tuple(map(load, specs)), tuple(weights) or (1.0,) * len(specs))
