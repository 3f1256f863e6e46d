"""`irc generate`: a prompt from stdin, and a text that ends in the middle."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
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


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that reach the generator, which stops at them."""
    seen: list[str] = []

    def encode(self: Failing, prompt: str) -> None:
        seen.append(prompt)
        raise IrcError("seen")

    monkeypatch.setattr(Failing, "encode", encode)
    monkeypatch.setattr(generation, "Generator", Failing)
    monkeypatch.setattr(session, "Runtime", lambda *arguments, **options: None)
    return seen


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (b"def main():\n", "def main():"),
        (b"caf\xc3\xa9\r\n", "caf\u00e9"),
        (b"\xef\xbb\xbfone\n\ntwo\n\n", "one\n\ntwo\n"),
        (b"-", "-"),
        (b"", ""),
    ],
)
def test_a_dash_reads_the_prompt_from_stdin(
    irc_main: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[str], given: bytes, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given), isatty=lambda: False))
    irc_main("generate", "folder", "-")
    assert prompts == [prompt]


def test_a_prompt_that_is_not_utf8_is_refused(
    irc_main: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"caf\xe9"), isatty=lambda: False))
    done = irc_main("generate", "folder", "-")
    assert done.code == 2
    assert "byte 3" in done.sentence()
    assert prompts == []
