"""Runs lm-evaluation-harness on our models: `irc eval MODEL --tasks ...`."""

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

from irc.bundle.key_policy import KeyPolicy
from irc.errors import InputError
from irc.evaluation.run import open_model
from irc.evaluation.tasks.local import LOCAL, RECALL_TOKENS, write_tasks
from irc.evaluation.tasks.scorers import OnnxScorer, Scorer, TorchScorer
from irc.files.untrusted import first_line
from irc.progress import ProgressFactory
from irc.runtime.folder import MANIFEST
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime
from irc.text.source import load_text

_BATCH_TOKENS = 4_096
_MOST_NEW_TOKENS = 256
_QUESTIONS = 200
_BOOTSTRAP = 1_000


class HarnessModel(TemplateLM):
    """A scorer as lm-evaluation-harness wants it. Requests of like length share a batch, padded on the right.

    Args:
        scorer: What gives logits.
        progress: Makes progress bars.
        side: What the bars call the model.
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
        """The token that ends a text; it conditions requests without a context."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise InputError("the model's tokenizer has neither an end nor a beginning of text; tasks need one")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood, and whether it is the greedy choice, of each (context, continuation)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
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
                    chances = logits[row, end - len(answer) : end].log_softmax(-1)
                    total = chances.gather(1, answer[:, None]).double().sum().item()
                    found[index] = (total, bool((chances.argmax(-1) == answer).all()))
                done += len(batch)
                bar.update(done)
        return found

    def _batch_logits(self, texts: list[list[int]]) -> torch.Tensor:
        longest = max(len(text) for text in texts)
        ids = torch.full((len(texts), longest), self.eot_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return self.scorer.logits(ids, mask)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's context."""
        owners: list[int] = []
        pairs: list[tuple[Any, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *utils.make_disjoint_window(window)) for window in windows]
            owners += [index] * len(made)
            pairs += made
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations up to each request's stop strings."""
        made = []
        with self.progress(f"{self.side}: texts", len(requests)) as bar:
            for done, request in enumerate(requests, start=1):
                prompt, options = request.args
                if options.get("do_sample"):
                    raise InputError("this task samples its answers; only tasks with greedy generation are supported")
                stop = options.get("until") or []
                stop = [stop] if isinstance(stop, str) else stop
                most = min(int(options.get("max_gen_toks", _MOST_NEW_TOKENS)), self.max_length // 2)
                made.append(self.scorer.continue_text(prompt, stop, most))
                bar.update(done)
        return made


def run_tasks(
    name: str,
    tasks: Sequence[str],
    progress: ProgressFactory,
    *,
    data: str = "stdlib",
    limit: int | None = None,
    task_path: Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    key_policy: KeyPolicy | None = None,
    sparsity: float | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle, a plain model or an ONNX folder on tasks.

    Args:
        name: Bundle, model folder, hub id, demo, or ONNX folder.
        tasks: Names that lm-evaluation-harness knows, and those of `irc.evaluation.tasks.local`.
        progress: Makes progress bars.
        data: Text that the local tasks are made of.
        limit: Questions a task; all (200 of a local one) when None.
        task_path: Folder of further task files.
        base: Where a bundle's base is, if it has moved.
        dtype: Of a PyTorch model.
        device: Of a PyTorch model.
        key_policy: Of a bundle, in place of its own.
        sparsity: Of a bundle, in place of its own, within its dial.

    Returns:
        The JSON object of `irc eval --tasks`: each task's figures, dense and routed, and the sparsity that was met.

    Raises:
        InputError: A task is not known, or the model cannot be opened.
    """
    for noisy in ("lm_eval", "lm-eval", "lm_eval.api.task", "datasets", "evaluate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as made:
        manager = _manager(tasks, task_path, Path(made))
        opened = {"base": base, "dtype": dtype, "key_policy": key_policy, "sparsity": sparsity}
        scorers = _scorers(name, device, opened)
        if any(task in LOCAL for task in tasks):
            first, context = next(iter(scorers.values())).tokenizer, next(iter(scorers.values())).context
            if "code_recall" in tasks and context < RECALL_TOKENS:
                raise InputError(
                    f"task code_recall asks for names up to {RECALL_TOKENS} tokens back; {name} reads {context}"
                )
            text = load_text(data)
            documents = text.split("heldout") or list(text.documents)
            count = _QUESTIONS if limit is None else limit
            write_tasks(tasks, documents, lambda piece: len(first(piece)["input_ids"]), Path(made), count)
            manager = _manager(tasks, task_path, Path(made))
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


def _scorers(name: str, device: str, opened: dict[str, Any]) -> dict[str, Scorer]:
    if (Path(name) / MANIFEST).is_file():
        fixed = next((key for key in ("sparsity", "key_policy") if opened[key] is not None), None)
        if fixed:
            raise InputError(f"{name}: an exported folder has its {fixed.replace('_', ' ')}; export again with another")
        generator = Generator(Runtime(Path(name), "cuda" if device.startswith("cuda") else device))
        return {"routed" if generator.runtime.exported.decisions else "dense": OnnxScorer(generator)}
    model = open_model(name, device=device, **opened)
    scorers: dict[str, Scorer] = {"dense": TorchScorer(model, "execute")}
    return scorers | ({"routed": TorchScorer(model, "route")} if model.spec else {})


def _manager(tasks: Sequence[str], task_path: Path | None, made: Path) -> TaskManager:
    """Return a task manager that knows the tasks; the harness's own files are read only where they are needed."""
    if task_path is not None and not task_path.is_dir():
        raise InputError(f"--task-path {task_path}: there is no such folder")
    paths = [str(path) for path in (made, task_path) if path is not None]
    foreign = [task for task in tasks if task not in LOCAL]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if any(task not in manager.all_tasks for task in foreign):
        manager = TaskManager(include_path=paths, include_defaults=True)
    unknown = [task for task in foreign if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"--tasks: lm-evaluation-harness knows no task '{unknown[0]}'; local ones are {', '.join(LOCAL)}, "
            "further ones can be given by --task-path"
        )
    return manager


def _evaluate(
    model: HarnessModel, tasks: Sequence[str], manager: TaskManager, limit: int | None
) -> dict[str, dict[str, float]]:
    try:
        loaded = manager.load(list(tasks))
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False)
    except InputError:
        raise
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"--tasks {','.join(tasks)}: the harness failed ({reason}); is their data at hand?") from error
    counts = found["n-samples"]
    return {
        task: {"questions": counts.get(task, {}).get("effective")}
        | {key.removesuffix(",none"): value for key, value in figures.items() if isinstance(value, float)}
        for task, figures in found["results"].items()
    }
