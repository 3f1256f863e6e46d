"""Detects out-of-memory errors and suggests a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from irc.errors import IrcError
from irc.recipe.recipe import Recipe


@contextmanager
def enough_memory(recipe: Recipe) -> Iterator[None]:
    """Replace the out-of-memory errors of a block by one that says what helps.

    Args:
        recipe: What the block works on.

    Raises:
        IrcError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise out_of_memory(recipe) from error
        raise


def out_of_memory(recipe: Recipe, details: str = "") -> IrcError:
    """Return the error to raise when a conversion does not fit into memory.

    Args:
        recipe: Recipe of the conversion.
        details: What takes how much, if it is known.
    """
    remedies = ["smaller router.batch_size and lff.batch_size", "a shorter seq_len"]
    if not recipe.activation_checkpointing:
        remedies.append("activation_checkpointing=true")
    cause = f": {details}" if details else ""
    return IrcError(f"{recipe.model}: does not fit into memory{cause}; try {', '.join(remedies)}", options=("seq_len",))


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: Python's, CUDA's, or that of PyTorch's CPU allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
