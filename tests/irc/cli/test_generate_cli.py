"""`irc generate` where the text ends in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from irc.errors import IrcError
from irc.runtime import generation, session


class Failing:
    """Continues a text by one word, then fails."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def encode(self, prompt: str) -> None:
        pass

    def generate(self, prompt: str, emit: Callable[[str], None], **options: Any) -> None:
        emit(" a")
        raise IrcError("the session ended; start again")


@pytest.mark.parametrize(("flags", "text"), [((), "Once a\n"), (("--json",), "")], ids=["plain", "json"])
def test_an_error_is_not_glued_to_the_text(
    irc_main: Any, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], text: str
) -> None:
    monkeypatch.setattr(generation, "Generator", Failing)
    monkeypatch.setattr(session, "Runtime", lambda *arguments, **options: None)
    done = irc_main("generate", "folder", "Once", *flags)
    assert (done.code, done.out) == (1, text)
    assert done.err == "error: the session ended; start again\n"
