"""Runs torch.export without its cache of fake tensors, without source lines and without PyTorch's warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo.config
import torch.fx.config


@contextmanager
def tracing() -> Iterator[None]:
    """Give a context in which torch.export captures a model in little over half the time.

    PyTorch caches the result of an operator by the shapes of its inputs. With symbolic sizes, rebuilding and comparing
    the entries takes longer than running the operator again. PyTorch also records the Python source lines of every
    node, which we do not use.
    """
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        _without_stack_traces(),
    ):
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch uses it itself
        yield


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # older releases do not have it
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
