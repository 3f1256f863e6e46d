"""The folder of an unfinished conversion: locked, tied to one recipe, holding every finished stage's result."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml
from safetensors.torch import load_file

from irc.bundle.loading import adapter_tensors, set_adapter
from irc.conversion.resume import INPUTS, check_same_recipe, located
from irc.errors import InputError
from irc.files.atomic import cannot_write, write_whole
from irc.files.tensors import write_safetensors
from irc.files.untrusted import first_line, read_json
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.training.lora import load_lora, save_lora


def is_main_process() -> bool:
    """Whether this process writes files; the others of a distributed run do not."""
    return int(os.environ.get("RANK", "0")) == 0


def work_folder(output: Path) -> Path:
    """Return where the unfinished conversion of an output lies: beside it."""
    return output.with_name(output.name + ".partial")


@contextmanager
def held(work: Path, recipe: Recipe, *, force: bool, resume: bool) -> Iterator[None]:
    """Hold a work folder: made, locked against a second convert, checked against another recipe.

    Args:
        work: The folder.
        recipe: Resolved recipe; with `resume` it must be the one that the folder was begun with.
        force: Drop what is there.
        resume: Continue what is there.

    Raises:
        InputError: Unfinished work lies there and neither flag is set, or another convert holds it.
    """
    if not is_main_process():
        yield
        return
    saved = work / "recipe.yaml"
    partial = saved.with_name(f"{saved.name}.tmp")
    if work.exists() and not saved.exists() and not (work.is_dir() and set(work.iterdir()) <= {partial}):
        raise InputError(f"{work}: unfinished work would lie here, but something else does; give another --output")
    if saved.exists() and not (force or resume):
        raise InputError(f"{work}: an unfinished conversion lies here; --resume continues it, --force starts over")
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with _locked(work.parent / f"{work.name}.lock"):
            if force and not resume:
                drop(work)
            work.mkdir(exist_ok=True)
            if resume and saved.exists():
                check_same_recipe(recipe, saved)
            write_whole(saved, yaml.safe_dump(located(recipe).to_dict(), sort_keys=False))
            try:
                yield
            except BaseException:
                if work.is_dir() and {path.name for path in work.iterdir()} <= {saved.name, INPUTS}:
                    shutil.rmtree(work)  # nothing to continue
                raise
    except OSError as error:
        raise cannot_write(work, error) from error


def drop(work: Path) -> None:
    """Remove a work folder, and what a killed removal left: at no moment is half of one there under its name."""
    gone = work.with_name(f".{work.name}.dropped")
    shutil.rmtree(gone, ignore_errors=True)
    if work.exists():
        os.replace(work, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _is_at(opened: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as files:
        opened = files.enter_context(path.open("a+"))
        _lock(opened, path)
        while not _is_at(opened, path):  # its holder removed it between our opening and locking it
            opened = files.enter_context(path.open("a+"))
            _lock(opened, path)
        opened.truncate(0)
        opened.write(str(os.getpid()))
        opened.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(opened: TextIO, path: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        opened.seek(0)
        who = opened.read().strip()
        raise InputError(
            f"{path.name}: another irc convert{f' (process {who})' if who else ''} is writing to this output; wait "
            "for it, or end it"
        ) from error


def stage_figures(work: Path, stage: str) -> dict[str, Any] | None:
    """Return what a finished stage measured; None when it is not finished."""
    done = work / f"{stage}.json"
    if not done.is_file():
        return None
    try:
        return read_json(done)
    except ValueError as error:
        raise InputError(f"{done}: damaged ({error}); start over with --force") from error


def save_stage(model: RoutedForCausalLM, work: Path, stage: str, figures: dict[str, Any]) -> None:
    """Write a finished stage's weights, then mark it finished, then drop its checkpoint."""
    write_safetensors(work / f"{stage}.safetensors", adapter_tensors(model), {"format": "pt"})
    if "lora" in model.facts:
        save_lora(model, work / "lora")
    write_whole(work / f"{stage}.json", json.dumps(figures))
    (work / f"{stage}.checkpoint.safetensors").unlink(missing_ok=True)


def load_stage(model: RoutedForCausalLM, work: Path, stage: str, recipe: Recipe) -> None:
    """Give a model the weights that a finished stage saved."""
    saved = work / f"{stage}.safetensors"
    try:
        tensors = load_file(saved)
    except Exception as error:
        raise InputError(f"{saved}: damaged ({first_line(error)}); start over with --force") from error
    set_adapter(model, tensors, str(work))
    if stage == "lora" and "lora" not in model.facts:
        load_lora(model, work / "lora", recipe.lora)
