"""The folder of an unfinished conversion: locked, tied to one recipe, holding every finished stage's result.

recipe.yaml                     the recipe that it was begun with
inputs.json                     identity of base and text
STAGE.checkpoint.safetensors    a stage that is running
STAGE.safetensors, STAGE.json   a finished stage: weights, then what it measured
lora/                           a peft folder, once stage lora is finished
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml
from safetensors.torch import load_file

from irc.bundle.loading import set_adapter
from irc.bundle.saving import adapter_tensors
from irc.conversion.resume import INPUTS, check_same_recipe, with_absolute_paths
from irc.errors import InputError
from irc.files.atomic import cannot_write, write_whole
from irc.files.tensors import write_safetensors
from irc.files.untrusted import first_line, read_json
from irc.model.routed import RoutedForCausalLM
from irc.progress import resumable
from irc.recipe.recipe import Recipe
from irc.training.lora import load_lora, save_lora
from irc.training.processes import is_main_process

log = logging.getLogger(__name__)

_RECIPE = "recipe.yaml"
_LORA = "lora"


def work_folder(output: Path) -> Path:
    """Return the folder of the unfinished conversion into an output: `OUTPUT.partial`, beside it."""
    return output.with_name(output.name + ".partial")


def stage_weights(folder: Path, stage: str) -> Path:
    """Return the file with a finished stage's weights."""
    return folder / f"{stage}.safetensors"


def finished_mark(folder: Path, stage: str) -> Path:
    """Return the file with a stage's figures; it is written last, so it marks the stage as finished."""
    return folder / f"{stage}.json"


@contextmanager
def open_work_folder(work: Path, recipe: Recipe, *, force: bool, resume: bool) -> Iterator[None]:
    """Create a work folder, or continue one, and lock it against a second conversion.

    Args:
        work: The folder.
        recipe: Resolved recipe. With `resume`, it must be the one that the folder was begun with.
        force: Remove the folder and start over.
        resume: Continue the folder.

    Raises:
        Interrupted: The block was interrupted, and the folder holds work to continue.
        InputError: Unfinished work is there and neither flag is set, it was begun with another recipe, another process
            holds it, or the folder cannot be written.
    """
    if not is_main_process():
        yield
        return
    saved = work / _RECIPE
    _check_folder(work, saved, continues=force or resume)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with _locked(work.parent / f"{work.name}.lock"):
            if force and not resume:
                remove_work(work)
            work.mkdir(exist_ok=True)
            if resume and saved.exists():
                check_same_recipe(recipe, saved)
            write_whole(saved, yaml.safe_dump(with_absolute_paths(recipe).to_dict(), sort_keys=False))
            try:
                yield
            except BaseException:
                if work.is_dir() and {path.name for path in work.iterdir()} <= {saved.name, INPUTS}:
                    shutil.rmtree(work)  # nothing to continue
                    raise
                with resumable():
                    raise
    except OSError as error:
        place, ours = os.fspath(error.filename or work), str(work)
        if not (place.startswith(ours) or ours.startswith(place)):  # something that was read, such as the base
            raise
        raise cannot_write(work, error) from error


def refuse_other_work(work: Path, recipe: Recipe, *, force: bool, resume: bool) -> None:
    """Refuse what `open_work_folder` would refuse, without touching the folder; arguments and errors as there."""
    if is_main_process():
        _check_folder(work, work / _RECIPE, continues=force or resume)
        if resume and (work / _RECIPE).exists():
            check_same_recipe(recipe, work / _RECIPE)


def _check_folder(work: Path, saved: Path, *, continues: bool) -> None:
    """Refuse a folder that is not one of unfinished work, and unfinished work that was not expected."""
    killed_early = saved.with_name(f"{saved.name}.tmp")  # a kill while the recipe was written leaves this alone
    if work.exists() and not saved.exists() and not (work.is_dir() and set(work.iterdir()) <= {killed_early}):
        raise InputError(
            f"{work}: unfinished work would go here, but something else has this name; give another output",
            options=("output",),
        )
    if saved.exists() and not continues:
        raise InputError(
            f"{work}: holds an unfinished conversion; resume it or start over", options=("resume", "force")
        )


def remove_work(work: Path) -> None:
    """Remove a work folder, and what a killed removal left; a folder of its name is complete at any moment."""
    removed = work.with_name(f".{work.name}.dropped")
    shutil.rmtree(removed, ignore_errors=True)
    if work.exists():
        os.replace(work, removed)
        shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as files:
        opened = files.enter_context(path.open("a+"))
        _lock(opened, path)
        while not _is_at(opened, path):  # its holder removed it after we opened it and before we locked it
            opened = files.enter_context(path.open("a+"))
            _lock(opened, path)
        opened.truncate(0)
        opened.write(str(os.getpid()))
        opened.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(opened: TextIO, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(opened: TextIO, path: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        opened.seek(0)
        holder = opened.read().strip()
        who = f" (process {holder})" if holder else ""
        raise InputError(
            f"{path.name}: another irc convert{who} is writing to this output; wait for it or stop it"
        ) from error
    except OSError as error:  # NFS and Lustre may be mounted without locks
        log.warning("%s: cannot be locked (%s); let no other irc convert write to this output", path, error.strerror)


def stage_figures(work: Path, stage: str) -> dict[str, Any] | None:
    """Return what a finished stage measured, or None if it is not finished.

    Raises:
        InputError: The file is damaged.
    """
    mark = finished_mark(work, stage)
    if not mark.is_file():
        return None
    try:
        return read_json(mark)
    except ValueError as error:
        raise InputError(f"{mark}: damaged ({error}); start over", options=("force",)) from error


def save_stage(model: RoutedForCausalLM, work: Path, stage: str, figures: dict[str, Any]) -> None:
    """Write a finished stage's weights, then mark it finished, then remove its checkpoint.

    Args:
        model: Model after the stage.
        work: The work folder.
        stage: Name of the stage.
        figures: What it measured.
    """
    write_safetensors(stage_weights(work, stage), adapter_tensors(model), {"format": "pt"})
    if model.lora is not None:
        save_lora(model, work / _LORA)
    write_whole(finished_mark(work, stage), json.dumps(figures))
    (work / f"{stage}.checkpoint.safetensors").unlink(missing_ok=True)


def load_stage(model: RoutedForCausalLM, work: Path, stage: str, recipe: Recipe) -> None:
    """Give a model the weights that a finished stage saved.

    Args:
        model: Model before the stage.
        work: The work folder.
        stage: Name of the stage.
        recipe: Recipe of the conversion.

    Raises:
        InputError: The file is damaged, or belongs to another model.
    """
    saved = stage_weights(work, stage)
    try:
        tensors = load_file(saved)
    except Exception as error:
        raise InputError(f"{saved}: damaged ({first_line(error)}); start over", options=("force",)) from error
    set_adapter(model, tensors, str(work))
    if stage == "lora" and model.lora is None:
        load_lora(model, work / _LORA, recipe.lora)
