"""Tasks made from Python text, for machines without a network: multiple choice with four answers, one of them right.

`code_continuation`  which lines come next in a function; the wrong answers come next in other functions.
`code_closing`       which brackets close here, or how far the next line is indented.
`code_recall`        which name comes next, last seen at least 200 tokens before; a small test of long context.

Each task is a YAML file and a JSON Lines file in the format of lm-evaluation-harness, written from held-out text.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from irc.errors import InputError
from irc.text.source import Document

CHOICES = 4
RECALL_DISTANCE = 200
_CONTEXT_CHARACTERS = 1_200
RECALL_TOKENS = 440
_CLOSERS = (")", "]", "}", "):", "))", ")]", "],", "),", "})", "):\n", ")\n")
_NAME = re.compile(r"\b[A-Za-z_]\w{4,}\b")
_CLOSED_LINE = re.compile(r"[\w'\"]([)\]}]+:?,?)\n$")
Question = dict[str, Any]
CountTokens = Callable[[str], int]


def write_tasks(
    names: Sequence[str],
    documents: Sequence[Document],
    count_tokens: CountTokens,
    folder: Path,
    limit: int,
    seed: int = 0,
) -> None:
    """Write local tasks.

    Args:
        names: Tasks to write, of `LOCAL`. Other names are ignored.
        documents: Held-out Python sources.
        count_tokens: Counts the tokens of a text with the model's tokenizer.
        folder: Where `NAME.yaml` and `NAME.jsonl` go.
        limit: Most questions per task.
        seed: Seed for the choice of questions and of wrong answers.

    Raises:
        InputError: The text contains no question for a task.
    """
    makers = {"code_continuation": _continuations, "code_closing": _closings, "code_recall": _recalls}
    for name, make in makers.items():
        if name not in names:
            continue
        draw = random.Random(f"{seed} {name}")
        questions = list(make(documents, draw, count_tokens, limit))
        if not questions:
            raise InputError(
                f"task {name}: the text contains no question for it; give more Python text", options=("data",)
            )
        lines = [json.dumps(question) for question in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(_config(name, folder)), encoding="utf-8")


LOCAL = ("code_continuation", "code_closing", "code_recall")


def _config(name: str, folder: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _question(context: str, right: str, wrong: Sequence[str], draw: random.Random) -> Question:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def _continuations(
    documents: Sequence[Document], draw: random.Random, count_tokens: CountTokens, limit: int
) -> Iterator[Question]:
    """Ask how functions continue after their middle. Wrong answers come from other functions with equal indentation."""
    cuts: list[tuple[str, str, int]] = []
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        for first, last in _functions(document.text):
            middle = (first + last) // 2
            following = "".join(lines[middle : middle + 2])
            if following.strip() and last - first >= 6:
                context = "".join(lines[first - 1 : middle])[-_CONTEXT_CHARACTERS:]
                cuts.append((context, following, _indent(following)))
    draw.shuffle(cuts)
    by_indent: dict[int, list[str]] = {}
    for _, following, indent in cuts:
        by_indent.setdefault(indent, []).append(following)
    count = 0
    for context, following, indent in cuts:
        others = [other for other in set(by_indent[indent]) if other != following]
        if count < limit and len(others) >= CHOICES - 1:
            count += 1
            yield _question(context, following, draw.sample(sorted(others), CHOICES - 1), draw)


def _functions(text: str) -> list[tuple[int, int]]:
    """Return the first and last line of every function in a source, counted from 1; empty if it does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, kinds)]


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _closings(
    documents: Sequence[Document], draw: random.Random, count_tokens: CountTokens, limit: int
) -> Iterator[Question]:
    """Ask in turn for the brackets that end a line and for the indentation that begins one."""
    brackets: list[Question] = []
    indents: list[Question] = []
    for document in documents:
        first, *lines = document.text.splitlines(keepends=True) or [""]
        start = len(first)
        for line in lines:
            before = document.text[max(0, start - _CONTEXT_CHARACTERS // 2) : start]
            brackets += _bracket_question(before, line, draw)
            indents += _indent_question(before, line, draw)
            start += len(line)
    for questions in (brackets, indents):
        draw.shuffle(questions)
    half = min((limit + 1) // 2, len(brackets), len(indents))
    pairs = zip(brackets[:half], indents[:half], strict=True)
    yield from [question for pair in pairs for question in pair][:limit]


def _bracket_question(before: str, line: str, draw: random.Random) -> list[Question]:
    """Return a question for the brackets that end a line, or nothing if it does not end with any."""
    end = _CLOSED_LINE.search(line)
    if end is None:
        return []
    right = end.group(1)
    others = sorted({closer.strip() for closer in _CLOSERS} - {right})
    return [_question(before + line[: end.start(1)], right, draw.sample(others, CHOICES - 1), draw)]


def _indent_question(before: str, line: str, draw: random.Random) -> list[Question]:
    """Return a question for the indentation of a line, or nothing if the line is not suitable."""
    indent, rest = _indent(line), line.lstrip(" ").rstrip("\n")
    is_code = bool(rest) and not rest.startswith(("#", '"', "'"))
    if not is_code or indent % 4 or indent > 16 or not before.strip():
        return []
    other_indents = [" " * width for width in (0, 4, 8, 12, 16) if width != indent]
    wrong = [spaces + rest for spaces in draw.sample(other_indents, CHOICES - 1)]
    return [_question(before, " " * indent + rest, wrong, draw)]


def _recalls(
    documents: Sequence[Document], draw: random.Random, count_tokens: CountTokens, limit: int
) -> Iterator[Question]:
    """Ask for a name that was last seen at least `RECALL_DISTANCE` tokens before. Wrong answers occur in between."""
    questions: list[Question] = []
    for document in documents:
        last_places: dict[str, int] = {}
        for match in _NAME.finditer(document.text):
            name, place = match.group(), match.start()
            before = last_places.get(name)
            last_places[name] = place
            # A token has about three characters, so check cheap bounds before counting tokens.
            if before is None or not 300 < place - before < 4 * RECALL_TOKENS or draw.random() > 0.2:
                continue
            context = document.text[before:place]
            if not RECALL_DISTANCE <= count_tokens(context) <= RECALL_TOKENS:
                continue
            others = sorted({other for other in _NAME.findall(context) if other != name and len(other) > 4})
            if len(others) >= CHOICES - 1:
                questions.append(_question(context, name, draw.sample(others, CHOICES - 1), draw))
    draw.shuffle(questions)
    yield from questions[:limit]
