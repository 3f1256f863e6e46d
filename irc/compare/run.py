"""compare(): trains and evaluates every cell of a plan, in turn or several at once, and resumes a killed run."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from irc import __version__
from irc.bundle.layout import METRICS, RECIPE
from irc.bundle.source import ModelSource
from irc.compare.cells import Cell, Plan, plan_to_dict
from irc.compare.results import summarize
from irc.compare.saved import check_same, read_figures
from irc.conversion.pipeline import convert, fit_to_base, resolve, rewritten
from irc.conversion.resume import check_same_recipe
from irc.devices import find_device
from irc.errors import InputError, IrcError
from irc.evaluation.run import TextChoice, run_evaluation
from irc.files.atomic import write_whole
from irc.model.checkpoint import BaseModel, find_base
from irc.model.own_text import texts_of
from irc.progress import ProgressFactory, place, resumable
from irc.recipe.recipe import Recipe
from irc.recipe.target import Target, target_of
from irc.training.processes import group

log = logging.getLogger(__name__)

MANIFEST, RESULTS, REPORT = "compare.json", "results.json", "report.html"
_CELLS, _STAGES = "cells", "stages"


def compare(
    plan: Plan,
    recipe: Recipe,
    output: Path,
    progress: ProgressFactory,
    *,
    jobs: int = 1,
    resume: bool = False,
    force: bool = False,
    kv_thresholds: tuple[float, ...] = (),
) -> dict[str, Any]:
    """Make every cell of a plan and collect the results.

    Args:
        plan: What to compare.
        recipe: What all cells share: model, text, steps.
        output: Folder of the comparison: `cells/NAME` holds the bundles, `stages` the stages that they share.
        progress: Makes progress bars.
        jobs: Number of conversions at a time, each in a process with its share of the cores.
        resume: Continue the comparison at `output`: finished cells are kept, a killed one continues.
        force: Replace the comparison at `output`.
        kv_thresholds: Thresholds of the key/value policy `reduced` to sweep on the first informed cell of each
            target.

    Returns:
        The object that `irc compare --json` prints and results.json holds.

    Raises:
        InputError: The plan cannot be carried out, or `output` holds something else.
        Interrupted: Ctrl-C stopped the comparison after it had begun.
    """
    if (size := group().size) > 1:
        raise InputError(f"a comparison runs in one process, but WORLD_SIZE is {size}; unset it")
    cells = plan.cells(recipe)
    recipes = {cell.name: resolve(cell.recipe(recipe)) for cell in cells}
    base = find_base(recipe.model)
    text = texts_of(recipe, base, progress, find_device(recipe.device))
    for cell in cells:
        try:
            recipes[cell.name].model_copy().fit_ranks(base.config.hidden_size)
        except InputError as error:
            options = ("ranks",) if cell.swept == "rank" else error.options
            raise InputError(f"cell {cell.name}: {error}", options=options) from error
    _refuse_unreachable(cells, recipes, base)
    facts = {
        "irc_version": __version__,
        "model": recipe.model,
        "base_identity": base.identity(),
        "data": {"name": text.name, "fingerprint": text.fingerprint()},
        "recipe": {key: value for key, value in recipe.to_dict().items() if key not in _PER_CELL},
    }
    _open(output, facts, base, resume=resume, force=force)
    started = time.monotonic()
    with resumable(), progress("cells", len(cells)) as bar:
        for done, name in enumerate(_make(cells, recipes, output, progress, jobs, base), start=1):
            bar.update(done, newest=name)
    rows = [_row(cell, output, recipes[cell.name].stages) for cell in cells]
    swept = _swept_cells(cells) if kv_thresholds else []
    sweeps = []
    for cell in swept:
        source = ModelSource(str(_folder(output, cell)), base)
        with resumable(), place(f"cell {cell.name}"):
            rows_of_cell = _sweep(source, recipe.eval_split, progress, kv_thresholds)
        sweeps.append({"cell": cell.name, "sparsity": cell.sparsity, "flops": cell.flops, "rows": rows_of_cell})
    results = {
        **facts,
        "plan": plan_to_dict(plan),
        "machine": _machine(recipe, jobs),
        "cells": rows,
        "summary": summarize(rows, plan.targets),
        "kv_sweep": sweeps,
        "seconds": round(time.monotonic() - started, 1),
        "output": str(output),
    }
    write_whole(output / RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def _refuse_unreachable(cells: Sequence[Cell], recipes: dict[str, Recipe], base: BaseModel) -> None:
    """Refuse FLOPs ratios that a policy, or a variant, cannot reach; its lowest ratio tells."""
    lowest: dict[tuple[Any, ...], Cell] = {}
    for cell in sorted((cell for cell in cells if cell.flops is not None), key=lambda cell: cell.flops or 0.0):
        lowest.setdefault((cell.policy, cell.variant), cell)
    for cell in lowest.values():
        recipe = recipes[cell.name].model_copy(deep=True)
        fit_to_base(recipe, base)
        try:
            rewritten(recipe, base)
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}", options=error.options) from error


_PER_CELL = ("policy", "sparsity", "flops", "seed", "stages", "checkpoint_seconds", "yardstick_tokens")


def _open(output: Path, facts: dict[str, Any], base: BaseModel, *, resume: bool, force: bool) -> None:
    """Create the folder, or check that it holds a comparison of the same model, text and recipe."""
    path = output / MANIFEST
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not path.is_file():
            raise InputError(f"{output}: exists and is not a comparison; give another folder", options=("output",))
        if not (resume or force):
            raise InputError(
                f"{output}: already holds a comparison; resume it or start over", options=("resume", "force")
            )
    if path.is_file() and resume:
        check_same(path, facts, base)
    try:
        if force and not resume:
            _remove(output)
        output.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise IrcError(f"{output}: cannot be written ({reason}); give another folder", options=("output",)) from error


def _remove(output: Path) -> None:
    if (output / MANIFEST).is_file():
        shutil.rmtree(output)


def _make(
    cells: list[Cell], recipes: dict[str, Recipe], output: Path, progress: ProgressFactory, jobs: int, base: BaseModel
) -> Iterator[str]:
    """Make the cells that are missing; yields the name of each cell that is there, or as soon as it is."""
    waiting = []
    for cell in cells:
        if _finished(output, cell):
            check_same_recipe(recipes[cell.name], _folder(output, cell) / RECIPE)
            yield cell.name
        else:
            waiting.append(cell)
    if jobs == 1:
        for cell in waiting:
            log.info("cell %s", cell.name)
            folder = _folder(output, cell)
            cache = output / _STAGES
            with place(f"cell {cell.name}"):
                convert(recipes[cell.name], folder, progress, resume=True, stage_cache_folder=cache, base=base)
            yield cell.name
        return
    with _processes(jobs) as (pool, running):
        futures = {
            pool.submit(_convert_in_process, recipes[c.name], _folder(output, c), jobs, running): c for c in waiting
        }
        for future in as_completed(futures):
            future.result()
            yield futures[future].name


def _folder(output: Path, cell: Cell) -> Path:
    return output / _CELLS / cell.name


def _finished(output: Path, cell: Cell) -> bool:
    return (_folder(output, cell) / METRICS).is_file()


@contextmanager
def _processes(jobs: int) -> Iterator[tuple[ThreadPoolExecutor, set[subprocess.Popen[str]]]]:
    """Open a thread pool; if this process is interrupted, the conversions that it started end too."""
    running: set[subprocess.Popen[str]] = set()
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool, running
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert_in_process(recipe: Recipe, folder: Path, jobs: int, running: set[subprocess.Popen[str]]) -> None:
    """Convert in a separate process with its share of the cores; its messages go to a log beside the cell."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    written, log_file = (folder.parent / f"{folder.name}.{suffix}" for suffix in ("yaml", "log"))
    write_whole(written, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    command = [sys.executable, "-m", "irc", "convert", "--recipe", str(written), "-o", str(folder), "--resume"]
    command += ["--stage-cache", str(folder.parent.parent / _STAGES), "--json"]
    with log_file.open("w") as messages:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code:
        lines = log_file.read_text(errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
        raise IrcError(f"cell {folder.name}: the conversion ended with exit code {code} ({reason})")
    log_file.unlink(missing_ok=True)
    written.unlink(missing_ok=True)


def _row(cell: Cell, output: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return a cell's figures from its bundle."""
    return {
        "name": cell.name,
        "policy": cell.policy,
        "sparsity": cell.sparsity,
        "flops": cell.flops,
        "seed": cell.seed,
        "lora": cell.lora,
        "variant": cell.variant,
        "swept": cell.swept,
        "changes": list(cell.changes),
        "figures": read_figures(_folder(output, cell) / METRICS, stages),
    }


def _swept_cells(cells: list[Cell]) -> list[Cell]:
    """Return the first informed cell of each target."""
    firsts: dict[Target | None, Cell] = {}
    for cell in cells:
        if (cell.policy, cell.variant) == ("informed", ""):
            firsts.setdefault(target_of(cell.sparsity, cell.flops), cell)
    return list(firsts.values())


def _sweep(
    source: ModelSource, split: str, progress: ProgressFactory, thresholds: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Sweep the key/value policy of a cell."""
    found = run_evaluation(source, progress, TextChoice(split=split), kv_thresholds=thresholds)
    rows: list[dict[str, Any]] = found["kv_sweep"]
    return rows


def _machine(recipe: Recipe, jobs: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jobs": jobs,
        "device": torch.cuda.get_device_name() if resolve(recipe).device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
