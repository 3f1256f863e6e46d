"""How torch.export is run: without its cache of fake tensors, and without what PyTorch says of itself there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo.config


@contextmanager
def tracing() -> Iterator[None]:
    """Give a context in which torch.export captures a model in two thirds of the time or so.

    PyTorch remembers what an operator gives for inputs of a certain shape. Where sizes are symbols, what it would
    remember is rebuilt and compared symbol by symbol, which takes longer than to ask the operator again.
    """
    with warnings.catch_warnings(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # its own use of it
        yield
