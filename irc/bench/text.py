"""The text that a bundle is timed on."""

from __future__ import annotations

from pathlib import Path

from irc.bench.scenario import TextTokens
from irc.bundle.loading import CONFIG, RECIPE, read_config
from irc.errors import InputError
from irc.model.checkpoint import find_base
from irc.recipe.recipe import load_recipe
from irc.text.source import load_text, token_stream


def heldout_tokens(bundle: str, data: str | None) -> TextTokens:
    """Return the held-out tokens of a text, int64 [tokens].

    Args:
        bundle: Folder of the bundle, whose tokenizer is used.
        data: Text, as `--data` takes it; the bundle's own when None.

    Raises:
        InputError: This is no bundle, or the text cannot be read.
    """
    folder = Path(bundle)
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{bundle}: this is no bundle; make one with irc convert, or give no BUNDLE for random weights"
        )
    recipe = folder / RECIPE
    text = load_text(data or load_recipe(recipe if recipe.is_file() else None).data)
    base = read_config(folder)["base"]
    tokenizer = find_base(base["name"], base.get("revision"), ask_hub=False).tokenizer
    tokens: TextTokens = token_stream(text.split("heldout"), tokenizer).numpy()
    return tokens
