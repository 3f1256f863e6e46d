"""Memory that runs out, told from other errors, and what takes less of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from irc.errors import IrcError
from irc.recipe.recipe import Recipe


@contextmanager
def enough_memory(recipe: Recipe) -> Iterator[None]:
    """Turn the error of memory that runs out in a block into a sentence.

    Raises:
        IrcError: It ran out; says what takes less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _ran_out(error):
            raise IrcError(f"{recipe.model}: does not fit into memory; {less_of_it(recipe)}") from error
        raise


def _ran_out(error: BaseException) -> bool:
    """Say whether an error is that of memory that ran out: Python's, CUDA's, or PyTorch's own on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def less_of_it(recipe: Recipe) -> str:
    """Return what a conversion may try that takes less memory."""
    wishes = ["smaller router.batch_size and lff.batch_size", "a shorter --seq-len"]
    if not recipe.activation_checkpointing:
        wishes.append("activation_checkpointing=true")
    return "try " + ", ".join(wishes)
