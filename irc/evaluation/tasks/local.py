"""Tasks made of Python text, for machines without a network: multiple choice, four answers, one true.

`code_continuation`  which lines follow in a function, among lines that follow in others.
`code_closing`       which brackets close here, or how far the next line is indented.
`code_recall`        which name stands here, last seen 200 tokens or more before; long context in small.

They are lm-evaluation-harness tasks like any other: a YAML file and a JSON file each, written from held-out text.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from irc.errors import InputError
from irc.text.source import Document

CHOICES = 4
RECALL_DISTANCE = 200
_CONTEXT_CHARACTERS = 1_200
RECALL_TOKENS = 440
_CLOSERS = (")", "]", "}", "):", "))", ")]", "],", "),", "})", "):\n", ")\n")
_NAME = re.compile(r"\b[A-Za-z_]\w{4,}\b")
Doc = dict[str, Any]


class Encode(Protocol):
    """Counts tokens."""

    def __call__(self, text: str) -> int:
        """Return how many tokens a text has."""
        ...


def write_tasks(
    names: Sequence[str], documents: Sequence[Document], encode: Encode, folder: Path, limit: int, seed: int = 0
) -> None:
    """Write local tasks.

    Args:
        names: Of `LOCAL`; others are left alone.
        documents: Python sources, held out.
        encode: Counts tokens of the model's tokenizer.
        folder: Where `NAME.yaml` and `NAME.jsonl` go.
        limit: Questions a task, at most.
        seed: Of the choice of questions and of distractors.

    Raises:
        InputError: The text yields no question for a task.
    """
    makers = {"code_continuation": _continuations, "code_closing": _closings, "code_recall": _recalls}
    for name, make in makers.items():
        if name not in names:
            continue
        draw = random.Random(f"{seed} {name}")
        questions = list(make(documents, draw, encode, limit))
        if not questions:
            raise InputError(f"task {name}: the text yields no question; give more Python text by --data")
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


def _question(context: str, true: str, others: Sequence[str], draw: random.Random) -> Doc:
    choices = [true, *others]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(true)}


def _continuations(documents: Sequence[Document], draw: random.Random, encode: Encode, limit: int) -> Iterator[Doc]:
    """Cut functions in their middle; distractors are the same number of lines of others, indented alike."""
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
    made = 0
    for context, following, indent in cuts:
        others = [other for other in set(by_indent[indent]) if other != following]
        if made < limit and len(others) >= CHOICES - 1:
            made += 1
            yield _question(context, following, draw.sample(sorted(others), CHOICES - 1), draw)


def _functions(text: str) -> list[tuple[int, int]]:
    """Return first and last line of every function of a source, counted from 1; none where it does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, kinds)]


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _closings(documents: Sequence[Document], draw: random.Random, encode: Encode, limit: int) -> Iterator[Doc]:
    """Ask by turns for the brackets that end a line, and for the indentation that begins one."""
    brackets: list[Doc] = []
    indents: list[Doc] = []
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        for index, line in enumerate(lines[1:], start=1):
            before = document.text[max(0, starts[index] - _CONTEXT_CHARACTERS // 2) : starts[index]]
            end = re.search(r"[\w'\"]([)\]}]+:?,?)\n$", line)
            if end:
                true = end.group(1)
                others = sorted({closer.strip() for closer in _CLOSERS} - {true})
                context = before + line[: end.start(1)]
                brackets.append(_question(context, true, draw.sample(others, CHOICES - 1), draw))
            indent, rest = _indent(line), line.lstrip(" ").rstrip("\n")
            if rest and indent % 4 == 0 and indent <= 16 and not rest.startswith(("#", '"', "'")) and before.strip():
                spaces = [" " * width for width in (0, 4, 8, 12, 16) if width != indent]
                wrong = [space + rest for space in draw.sample(spaces, CHOICES - 1)]
                indents.append(_question(before, " " * indent + rest, wrong, draw))
    for questions in (brackets, indents):
        draw.shuffle(questions)
    half = min((limit + 1) // 2, len(brackets), len(indents))
    pairs = zip(brackets[:half], indents[:half], strict=True)
    yield from [question for pair in pairs for question in pair][:limit]


def _recalls(documents: Sequence[Document], draw: random.Random, encode: Encode, limit: int) -> Iterator[Doc]:
    """Ask for a name whose last mention lies at least `RECALL_DISTANCE` tokens back; distractors stand in the text."""
    found: list[Doc] = []
    for document in documents:
        names = [(match.group(), match.start()) for match in _NAME.finditer(document.text)]
        last: dict[str, int] = {}
        for name, place in names:
            before = last.get(name)
            last[name] = place
            # Tokens have three characters or so: cheap bounds first, then the count itself.
            if before is None or not 300 < place - before < 4 * RECALL_TOKENS or draw.random() > 0.2:
                continue
            context = document.text[before:place]
            length = encode(context)
            if not RECALL_DISTANCE <= length <= RECALL_TOKENS:
                continue
            others = sorted({other for other in _NAME.findall(context) if other != name and len(other) > 4})
            if len(others) >= CHOICES - 1:
                found.append(_question(context, name, draw.sample(others, CHOICES - 1), draw))
    draw.shuffle(found)
    yield from found[:limit]
