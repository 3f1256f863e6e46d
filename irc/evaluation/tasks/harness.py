"""Runs lm-evaluation-harness on our models, for `irc eval MODEL --tasks ...`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from exporters.onnx_format import MANIFEST
from irc.bundle.loading import open_model
from irc.bundle.source import ModelSource, as_source
from irc.errors import InputError
from irc.evaluation.tasks.local import LOCAL, RECALL_TOKENS, write_tasks
from irc.evaluation.tasks.scorers import OnnxScorer, Scorer, TorchScorer
from irc.files.untrusted import first_line
from irc.progress import ProgressFactory
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime
from irc.text.source import load_text

_BATCH_TOKENS = 4_096
_MAX_NEW_TOKENS = 256
_QUESTIONS = 200
_BOOTSTRAP = 1_000


class HarnessModel(TemplateLM):
    """Adapts a scorer to lm-evaluation-harness. Requests of similar length share a batch, padded on the right.

    Args:
        scorer: The model.
        progress: Makes progress bars.
        side: Name of the model in the progress bars, `dense` or `routed`.
    """

    def __init__(self, scorer: Scorer, progress: ProgressFactory, side: str) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer
        self.progress = progress
        self.side = side
        self.max_length = scorer.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. It is the context of requests that have none."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise InputError("the model's tokenizer has no end-of-text and no beginning-of-text token; tasks need one")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation; alone, if one token spans all of the continuation."""
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and whether it is the greedy choice."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        texts = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        order = sorted(range(len(requests)), key=lambda index: -len(texts[index]))
        done = 0
        with self.progress(f"{self.side}: answers", len(requests)) as bar:
            while done < len(order):
                rows = max(1, _BATCH_TOKENS // max(1, len(texts[order[done]])))
                batch = order[done : done + rows]
                logits = self._batch_logits([texts[index][:-1] for index in batch])
                for row, index in enumerate(batch):
                    answer = torch.tensor(requests[index][2][-self.max_length :])
                    end = len(texts[index]) - 1
                    log_probabilities = logits[row, end - len(answer) : end].log_softmax(-1)
                    total = log_probabilities.gather(1, answer[:, None]).double().sum().item()
                    scores[index] = (total, bool((log_probabilities.argmax(-1) == answer).all()))
                done += len(batch)
                bar.update(done)
        return scores

    def _batch_logits(self, texts: list[list[int]]) -> torch.Tensor:
        longest = max(len(text) for text in texts)
        ids = torch.full((len(texts), longest), self.eot_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return self.scorer.logits(ids, mask)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, computed in windows of the model's context."""
        request_of_window: list[int] = []
        pairs: list[tuple[Any, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [(None, *utils.make_disjoint_window(window)) for window in windows]
            request_of_window += [index] * len(disjoint)
            pairs += disjoint
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(request_of_window, self._loglikelihood_tokens(pairs), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each request, up to its stop strings."""
        texts = []
        with self.progress(f"{self.side}: texts", len(requests)) as bar:
            for done, request in enumerate(requests, start=1):
                prompt, options = request.args
                if options.get("do_sample"):
                    raise InputError("the task samples its answers (do_sample); choose a task with greedy generation")
                stop = options.get("until") or []
                stop = [stop] if isinstance(stop, str) else stop
                max_tokens = min(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), self.max_length // 2)
                texts.append(self.scorer.continue_text(prompt, stop, max_tokens))
                bar.update(done)
        return texts


def run_tasks(
    model: ModelSource | str,
    tasks: Sequence[str],
    progress: ProgressFactory,
    *,
    data: str = "stdlib",
    limit: int | None = None,
    task_path: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle, a plain model or an ONNX folder on tasks.

    Args:
        model: Bundle, model folder, hub id, demo, or ONNX folder, and how to open it.
        tasks: Names of tasks of lm-evaluation-harness or of `irc.evaluation.tasks.local`.
        progress: Makes progress bars.
        data: Text for the local tasks.
        limit: Most questions per task; None for all (200 for a local task).
        task_path: Folder of further task files.

    Returns:
        The JSON object of `irc eval --tasks`: the figures of each task, dense and routed, and the realized sparsity.

    Raises:
        InputError: A task is unknown, or the model cannot be opened.
    """
    source = as_source(model)
    name = source.name
    for noisy in ("lm_eval", "lm-eval", "lm_eval.api.task", "datasets", "evaluate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        local_files = Path(folder)
        manager = _manager(tasks, task_path, local_files)
        scorers = _scorers(source)
        if any(task in LOCAL for task in tasks):
            scorer = next(iter(scorers.values()))
            if "code_recall" in tasks and scorer.context < RECALL_TOKENS:
                raise InputError(
                    f"task code_recall needs a context of {RECALL_TOKENS} tokens, but {name} reads {scorer.context}; "
                    "leave the task out"
                )
            _write_local_tasks(tasks, scorer.tokenizer, data, local_files, _QUESTIONS if limit is None else limit)
            manager = _manager(tasks, task_path, local_files)
        results: dict[str, dict[str, Any]] = {}
        sparsity = None
        for side, scorer in scorers.items():
            answers = _evaluate(HarnessModel(scorer, progress, side), tasks, manager, limit)
            for task, figures in answers.items():
                results.setdefault(task, {})[side] = figures
            if side == "routed" and scorer.pairs:
                sparsity = 1 - scorer.executed / scorer.pairs
    return {
        "model": name,
        "backend": "onnxruntime" if (Path(name) / MANIFEST).is_file() else "pytorch",
        "tasks": results,
        "sparsity": {"realized": sparsity},
        "limit": limit,
    }


def _write_local_tasks(tasks: Sequence[str], tokenizer: Any, data: str, folder: Path, limit: int) -> None:
    """Write the local tasks from the held-out split of a text, or from all of it if that split is empty."""
    text = load_text(data)
    documents = text.split("heldout") or list(text.documents)
    write_tasks(tasks, documents, lambda piece: len(tokenizer.encode(piece)), folder, limit)


def _scorers(source: ModelSource) -> dict[str, Scorer]:
    """Open the model; return its scorers by side, `dense` and `routed`."""
    if (Path(source.name) / MANIFEST).is_file():
        for setting, value in (("target", source.target), ("key policy", source.key_policy)):
            if value is not None:
                raise InputError(f"{source.name}: the {setting} of an exported folder is fixed; export it again")
        device = "cuda" if source.device.startswith("cuda") else source.device
        generator = Generator(Runtime(Path(source.name), device))
        return {"routed" if generator.runtime.exported.decisions else "dense": OnnxScorer(generator)}
    model = open_model(source)
    scorers: dict[str, Scorer] = {"dense": TorchScorer(model, "execute")}
    return scorers | ({"routed": TorchScorer(model, "route")} if model.spec else {})


def _manager(tasks: Sequence[str], task_path: Path | None, local_files: Path) -> TaskManager:
    """Return a task manager that knows the tasks. The harness's own task files are read only if they are needed."""
    if task_path is not None and not task_path.is_dir():
        raise InputError(f"{task_path}: no such folder of task files", options=("task_path",))
    paths = [str(path) for path in (local_files, task_path) if path is not None]
    not_local = [task for task in tasks if task not in LOCAL]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if any(task not in manager.all_tasks for task in not_local):
        manager = TaskManager(include_path=paths, include_defaults=True)
    unknown = [task for task in not_local if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"unknown task '{unknown[0]}'; choose a task of lm-evaluation-harness, a local one ({', '.join(LOCAL)}), "
            "or name a folder of task files",
            options=("tasks", "task_path"),
        )
    return manager


def _evaluate(
    model: HarnessModel, tasks: Sequence[str], manager: TaskManager, limit: int | None
) -> dict[str, dict[str, float]]:
    try:
        loaded = manager.load(list(tasks))
        output = evaluate(model, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False)
    except InputError:
        raise
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        raise InputError(
            f"tasks {','.join(tasks)}: the harness failed ({first_line(error)}); check that their data is available"
        ) from error
    results: dict[str, dict[str, float]] = {}
    for task, figures in output["results"].items():
        results[task] = {"questions": output["n-samples"].get(task, {}).get("effective")}
        for key, value in figures.items():
            if isinstance(value, float):
                results[task][key.removesuffix(",none")] = value
    return results
