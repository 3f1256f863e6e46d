"""How torch.export is run: without its cache of fake tensors, without lines of Python, and without PyTorch's asides."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo.config
import torch.fx.config


@contextmanager
def tracing() -> Iterator[None]:
    """Give a context in which torch.export captures a model in little over half the time.

    PyTorch remembers what an operator gives for inputs of a certain shape. Where sizes are symbols, what it would
    remember is rebuilt and compared symbol by symbol, which takes longer than to ask the operator again. And it notes
    for every node the lines of Python that it came from, which nothing here reads.
    """
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        _without_stack_traces(),
    ):
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # its own use of it
        yield


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # not every release knows it
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
