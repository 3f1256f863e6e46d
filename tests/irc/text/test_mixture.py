from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from irc.text.mixture import Mixture, load_texts
from irc.text.source import Document, TextSource, token_stream


class Letters:
    """Tokenizes text into the code points of its letters."""

    eos_token_id = 0

    def __call__(self, text: str, /, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def _text(letter: str, documents: int, letters: int = 99) -> TextSource:
    """Return documents of one letter, of 100 tokens each with the end of text."""
    made = (Document(f"{letter}{index}.txt", letter * letters) for index in range(documents))
    return TextSource(letter, tuple(made))


def _counts(stream: torch.Tensor, length: int, letters: str) -> list[int]:
    """Return how many windows hold each letter; every window must hold text of one source alone."""
    windows = stream.view(-1, length)
    found = [{chr(token) for token in row.tolist() if token} for row in windows]
    assert all(len(kinds) == 1 for kinds in found)
    return [found.count({letter}) for letter in letters]


def test_a_single_text_is_read_as_ever() -> None:
    text = _text("a", 7)
    mixed = Mixture((text,), (3.0,))
    assert mixed.stream(None, Letters(), 64).tolist() == token_stream(text.documents, Letters()).tolist()
    assert (mixed.name, mixed.fingerprint()) == ("a", text.fingerprint())


def test_weights_decide_the_shares() -> None:
    texts = (_text("a", 40), _text("b", 40), _text("c", 40))
    equal = Mixture(texts, (1.0, 1.0, 1.0)).stream(None, Letters(), 50)
    assert _counts(equal, 50, "abc") == [80, 80, 80]
    weighted = Mixture(texts, (2.0, 1.0, 0.0)).stream(None, Letters(), 50)
    assert _counts(weighted, 50, "abc") == [80, 40, 0]


def test_the_text_that_is_shortest_for_its_weight_limits_the_mixture() -> None:
    texts = (_text("a", 400), _text("b", 10))
    assert _counts(Mixture(texts, (1.0, 1.0)).stream(None, Letters(), 50), 50, "ab") == [20, 20]
    assert _counts(Mixture(texts, (20.0, 1.0)).stream(None, Letters(), 50), 50, "ab") == [400, 20]


def test_windows_are_in_a_random_order_that_is_always_the_same() -> None:
    mixed = Mixture((_text("a", 40), _text("b", 40)), (1.0, 1.0))
    first, second = (mixed.stream("train", Letters(), 50) for _ in range(2))
    assert torch.equal(first, second)
    kinds = [chr(row[0] or row[1]) for row in first.view(-1, 50).tolist()]
    changes = sum(one != other for one, other in pairwise(kinds))
    assert 0.3 * len(kinds) < changes < 0.7 * len(kinds)


def test_texts_and_weights_decide_the_fingerprint() -> None:
    a, b = _text("a", 3), _text("b", 3)
    mixtures = [
        Mixture((a, b), (1.0, 1.0)),
        Mixture((b, a), (1.0, 1.0)),
        Mixture((a, b), (1.0, 2.0)),
        Mixture((a, _text("b", 4)), (1.0, 1.0)),
    ]
    assert len({mixed.fingerprint() for mixed in mixtures}) == 4
    assert Mixture((a, b), (2.0, 2.0)).fingerprint() == mixtures[0].fingerprint()  # the same shares


def test_files_are_loaded_with_equal_weights(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 9 + "\n")
    mixed = load_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert mixed.weights == (1.0, 1.0)
    assert mixed.name == f"{tmp_path / 'a.txt'} + {tmp_path / 'b.txt'}"
    assert [document.text[0] for document in mixed.documents] == ["a", "b"]


# A part of a long text


def test_only_enough_documents_are_read() -> None:
    documents = _text("a", 50).documents
    whole = token_stream(documents, Letters())
    part = token_stream(documents, Letters(), enough=950)
    assert (len(whole), len(part)) == (5000, 1000)
    assert torch.equal(token_stream(documents, Letters(), enough=5000), whole)


def test_which_documents_are_read_does_not_depend_on_the_others() -> None:
    documents = [Document(f"{index}.txt", chr(200 + index) * 9) for index in range(100)]

    def read(given: list[Document], enough: int) -> list[int]:
        return [token for token in token_stream(given, Letters(), enough).unique().tolist() if token]

    some = read(documents, 300)
    assert some == sorted(some)
    assert len(some) == 30
    assert some != list(range(200, 230))  # not the first ones
    fewer = [document for document in documents if ord(document.text[0]) in some or int(document.name[:-4]) % 2]
    assert read(fewer, 300) == some  # those that were not read are gone
    assert set(read(documents, 200)) < set(some)
