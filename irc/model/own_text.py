"""The model's own text: what the dense model writes when it continues instructions and beginnings.

It needs no text of the user's, works offline, and is spread over what the model knows. It is sampled without any
limit (temperature 1, no top-k), so that it follows the model's own distribution, and kept in a cache beside the hub's.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, StoppingCriteria

from irc.errors import InputError
from irc.files.atomic import write_whole
from irc.model.build import build_plain
from irc.model.checkpoint import BaseModel
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe
from irc.text.mixture import Mixture, load_texts
from irc.text.source import OWN_TEXT as NAME
from irc.text.source import Document, Split, TextSource, load_text

_VERSION = 1  # of what is written here, in the name of the cached file
# Little text, of which threshold and figures need some thousand tokens each. Two kinds of documents alternate, so the
# length is odd.
_TURNS: tuple[Split, ...] = (*("heldout", "calibration") * 2, "validation", *("train",) * 10)
_NEW_TOKENS = 224
_BATCH = 64
_TRIED = 8  # tokens on which the time of sampling is measured
_INSTRUCTIONS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What should I know about {}?",
    "List five facts about {}.",
    "Write a Python program that has to do with {}.",
    "Summarize what is known about {}.",
    "Write an e-mail to a colleague about {}.",
    "What are common mistakes with {}?",
    "Compare {} with {}.",
    "Write a poem about {}.",
    "I need advice on {}. What would you do?",
    "Write a dialogue between two friends about {}.",
    "Write the manual page of a tool for {}.",
    "How do I learn about {}?",
    "Argue for and against {}.",
    "Write a quiz about {}, with answers.",
    "Write a function in C that has to do with {}.",
    "What is the history of {}?",
    "Write a scene of a novel in which {} matters.",
    "Answer in one sentence: what is {}?",
)
_TOPICS = (
    *("rivers", "taxes", "photosynthesis", "a lighthouse keeper", "sorting", "the French Revolution", "baking bread"),
    *("black holes", "a lost dog", "chess", "vaccines", "steam engines", "jealousy", "supply chains", "probability"),
    *("a train journey", "the moon", "hash tables", "poetry", "volcanoes", "databases", "the sea", "football"),
    *("medieval castles", "machine learning", "a job interview", "bees", "electric cars", "grammar", "a birthday"),
    *("gravity", "painting", "regular expressions", "the nervous system", "inflation", "mountains", "a detective"),
    *("computer networks", "sleep", "coffee", "ancient Rome", "recursion", "music", "a broken window", "the climate"),
    *("matrices", "gardening", "ships", "friendship", "unit tests", "bridges", "birds", "a robot", "cities", "writing"),
    *("fractions", "the heart", "glass", "deserts", "operating systems", "elections", "wool", "maps", "an old house"),
)
_BEGINNINGS = (
    *("The", "In", "It was", "A", "When", "If", "To", '"', "She", "He", "On", "This", "There", "We", "I", "Dear"),
    *("Chapter 1\n\n", "Question:", "Abstract\n\n", "NAME\n", "Usage:", "#", "##", "1.", "-", "<p>", "The following"),
    *("def", "class", "import", "from", "#include <", "static int", "function", "SELECT"),
)


def texts_of(
    recipe: Recipe, base: BaseModel, progress: ProgressFactory, device: str = "cpu", data: str | None = None
) -> Mixture:
    """Load the texts of a recipe, the model's own text among them.

    Args:
        recipe: Names the texts and their weights.
        base: The model.
        progress: Makes a progress bar while own text is sampled.
        device: Where to sample it.
        data: The name of a text in place of those of the recipe.

    Raises:
        InputError: A text cannot be read.
    """

    def load(name: str) -> TextSource:
        if name != NAME:
            return load_text(name)
        return own_text(base, recipe.self_tokens, recipe.self_seed, progress, device)

    if data:
        return load_texts([data], load=load)
    loaded = {name: load(name) for name in sorted(recipe.data, key=NAME.__eq__)}  # sampling last: it takes longest
    return load_texts(recipe.data, recipe.data_weights, loaded.__getitem__)


def own_text(
    base: BaseModel, tokens: int, seed: int, progress: ProgressFactory, device: str = "cpu", cache: Path | None = None
) -> TextSource:
    """Return text that the dense model samples: half of it answers to instructions if the model has a chat template.

    Args:
        base: The model.
        tokens: About how many tokens to sample.
        seed: The same seed gives the same text on the same machine.
        progress: Makes a progress bar.
        device: Where to sample.
        cache: Folder of the texts that were sampled earlier; by default `irc/own-text` beside the hub's cache.

    Returns:
        Documents `self#0`, `self#1` and so on; of 15 in turn, 10 are for training, and two each for thresholds and for
        figures.
    """
    path = own_text_file(base, tokens, seed, cache)
    if path.is_file():
        texts = json.loads(path.read_text(encoding="utf-8"))
    else:
        texts = _sampled(base, tokens, seed, progress, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(texts))
    documents = (Document(f"{NAME}#{index}", text) for index, text in enumerate(texts))
    return TextSource(NAME, tuple(documents), _TURNS)


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "irc" / "own-text"


def own_text_file(base: BaseModel, tokens: int, seed: int, cache: Path | None = None) -> Path:
    """Return the file that keeps such a text once it has been sampled; arguments as of `own_text`."""
    key = json.dumps([_VERSION, base.identity(), tokens, seed])
    return (cache or _cache()) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def check_own_text(recipe: Recipe) -> None:
    """Refuse windows that the own text of a recipe will not fill.

    Args:
        recipe: Its windows are settled.

    Raises:
        InputError: Names the split and how many tokens would do.
    """
    splits: tuple[tuple[Split, int], ...] = (
        ("train", recipe.train_window),
        ("calibration", recipe.window),
        (recipe.eval_split, recipe.window),
    )
    for split, window in splits:
        found = recipe.self_tokens * _TURNS.count(split) / len(_TURNS)
        if found < window:
            raise InputError(
                f"self_tokens is {recipe.self_tokens}, of which about {found:.0f} are in the {split} split, but a "
                f"window has {window}; give at least {math.ceil(recipe.self_tokens * window / found)}, or another text",
                options=("self_tokens", "data", "seq_len"),
            )


def sampling_seconds(base: BaseModel, tokens: int, seed: int, device: str) -> float:
    """Return about how many seconds it takes to sample such a text.

    A token takes the longer the more are before it, so the time of one is that in the middle of a document.
    """
    sampler, clock = _Sampler(base, seed, device), _Clock()
    prompts = sampler.prompts()
    sampler.continued(prompts, 1)  # reads the weights from disk
    started = time.monotonic()
    sampler.continued(prompts, 1)
    first = time.monotonic() - started
    half = sampler.length // 2
    sampler.continued([[*row, *islice(cycle(row), half)] for row in prompts], 1 + min(_TRIED, half), clock)
    per_token = (clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1)
    batches = math.ceil(tokens / (sum(map(len, prompts)) + _BATCH * sampler.length))
    return batches * (first + per_token * (sampler.length - 1))


def _sampled(base: BaseModel, tokens: int, seed: int, progress: ProgressFactory, device: str) -> list[str]:
    """Sample until there are enough tokens, a batch of documents at a time."""
    sampler = _Sampler(base, seed, device)
    found: list[str] = []
    count = 0
    with torch.random.fork_rng(), progress("own text", tokens) as bar:
        torch.manual_seed(seed)
        while count < tokens:
            for ids in sampler.continued(sampler.prompts(), sampler.length):
                found.append(str(base.tokenizer.decode(ids)))
                count += len(ids)
            bar.update(min(count, tokens))
    return found


class _Clock(StoppingCriteria):
    """Notes when each token of a batch was there, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """Note the time; no row ends."""
        self.times.append(time.monotonic())
        return cast(torch.BoolTensor, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))


class _Sampler:
    """A dense model that continues prompts, a batch at a time.

    Attributes:
        length: The most tokens that it writes after a prompt.
    """

    def __init__(self, base: BaseModel, seed: int, device: str) -> None:
        base.check_finite()
        self._model, self._device = build_plain(base, device=device), device
        self._prompts = _prompts(base.tokenizer, random.Random(seed))
        given = base.generation.eos_token_id
        self._ends = [end for end in (given if isinstance(given, list) else [given]) if end is not None]
        context = getattr(base.config, "max_position_embeddings", None) or 2 * _NEW_TOKENS
        self._longest_prompt = context // 2
        self.length = min(_NEW_TOKENS, context // 2)

    def prompts(self) -> list[list[int]]:
        """Return the ids of the next batch of prompts."""
        return [next(self._prompts)[: self._longest_prompt] for _ in range(_BATCH)]

    @torch.no_grad()
    def continued(self, rows: list[list[int]], length: int, clock: _Clock | None = None) -> list[list[int]]:
        """Return prompts, each followed by up to `length` sampled tokens."""
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            eos_token_id=self._ends or None,
            pad_token_id=0,
        )
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self._device)
        written = self._model.generate(
            ids, attention_mask=mask, generation_config=settings, stopping_criteria=[clock] if clock else None
        )
        found = []
        for row, new in zip(rows, written[:, width:].tolist(), strict=True):
            end = next((index for index, token in enumerate(new) if token in self._ends), len(new))
            found.append([*row, *new[:end]])
        return found


def _prompts(tokenizer: Any, draw: random.Random) -> Iterator[list[int]]:
    """Yield the ids of prompts for ever: beginnings, and every second time an instruction, if there is a template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    while True:
        if has_template:
            task = draw.choice(_INSTRUCTIONS)
            messages = [{"role": "user", "content": task.format(*draw.sample(_TOPICS, task.count("{}")))}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            yield tokenizer(text, add_special_tokens=False)["input_ids"]
        yield tokenizer(draw.choice(_BEGINNINGS))["input_ids"]  # with the first token that the model expects, if any
