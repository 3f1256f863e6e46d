"""Releases memory-mapped weights: finds their pages, and frees them after they were read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

_LEAST_BYTES = 1 << 28
"""Below this many mapped bytes, releasing weights is not worth a system call."""


class MappedPages:
    """The memory pages of weights that are mapped from safetensors files. Empty on other devices and systems.

    A released page is read from the file again when it is touched, or from the system's cache if it is still there. A
    weight that was written to, or that requires a gradient, is private memory and is never released.

    Args:
        weights: Weights whose pages can be released.
        least: With fewer mapped bytes than this, nothing is ever released.
    """

    def __init__(self, weights: Iterable[torch.Tensor], least: int = _LEAST_BYTES) -> None:
        regions = _regions()
        self._lengths: dict[int, int] = {}
        for weight in weights:
            first, last = _whole_pages(weight)
            if first < last and any(start <= first and last <= end for start, end in regions):
                self._lengths[first] = last - first
        if self.bytes() < least:
            self._lengths.clear()

    def bytes(self) -> int:
        """Return the size of all mapped weights in bytes."""
        return sum(self._lengths.values())

    def release(self, weights: Iterable[torch.Tensor]) -> None:
        """Release the pages of some of the weights."""
        for weight in weights if self._lengths else ():
            if weight._version == 0 and not weight.requires_grad:
                first, _ = _whole_pages(weight)
                _dont_need(first, self._lengths.get(first, 0))


@contextmanager
def released(model: nn.Module, blocks: list[str]) -> Iterator[None]:
    """Within a `with` block, release the mapped weights of each block of the model as soon as it was computed.

    For forward passes without a backward pass, which would read the file again.

    Args:
        model: Captured model.
        blocks: Paths of its blocks.
    """
    pages = MappedPages(model.parameters())
    handles = []

    def release(module: nn.Module, *_: object) -> None:
        pages.release(module.parameters())

    for name in blocks if pages.bytes() else ():
        handles.append(model.get_submodule(name).register_forward_hook(release))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's whole pages and the address after them; equal if there are none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or type(tensor.data) is not torch.Tensor:
        return 0, 0
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    return first, max(first, last)


def _regions() -> list[tuple[int, int]]:
    """Return start and end of every mapped file. Names do not count: hub caches link to files named by hashes."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = (int(part, 16) for part in place.split("-"))
            found.append((start, end))
    return found


def _dont_need(address: int, length: int) -> None:
    if length:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))
