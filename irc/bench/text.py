"""Loads the text that a bundle is timed on."""

from __future__ import annotations

from pathlib import Path

from irc.bench.scenario import TextTokens
from irc.bundle.contents import read_bundle
from irc.bundle.layout import is_bundle
from irc.errors import InputError
from irc.model.checkpoint import find_base
from irc.model.own_text import texts_of
from irc.progress import silent
from irc.text.source import token_stream


def heldout_tokens(bundle: str, data: str | None) -> TextTokens:
    """Return the held-out tokens of a text, int64 [tokens].

    Args:
        bundle: Folder of the bundle, whose tokenizer is used.
        data: A text, as `irc.text.source.load_text` reads it; the text of the bundle's conversion if None.

    Raises:
        InputError: The folder is not a bundle, or the text cannot be read.
    """
    folder = Path(bundle)
    if not is_bundle(folder):
        raise InputError(
            f"{bundle}: not a bundle; make one with irc convert, or name none to time a model of random weights"
        )
    opened = read_bundle(folder)
    base = find_base(opened.config.base.name, opened.config.base.revision, ask_hub=False)
    text = texts_of(opened.recipe, base, silent, data=data)
    tokens: TextTokens = token_stream(text.split("heldout"), base.tokenizer).numpy()
    return tokens
