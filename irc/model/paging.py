"""Weights that are mapped files: which parts of memory they are, and how they leave it once they were read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

_WORTH = 1 << 28
"""Bytes of a model's mapped weights from which on releasing them is worth a word to the system."""


class MappedPages:
    """The places of weights that are mapped from safetensors files; none on other devices and systems.

    Released pages are read from the file again when they are touched (from the system's cache, where it has them
    still). A weight that was written to, or may be, is private memory and never released.

    Args:
        weights: Whose places are noted.
        least: Bytes of mapped weights under which nothing is ever released.
    """

    def __init__(self, weights: Iterable[torch.Tensor], least: int = _WORTH) -> None:
        regions = _regions()
        self._lengths: dict[int, int] = {}
        for weight in weights:
            first, last = _whole_pages(weight)
            if first < last and any(start <= first and last <= end for start, end in regions):
                self._lengths[first] = last - first
        if self.bytes() < least:
            self._lengths.clear()

    def bytes(self) -> int:
        """Return the size of all mapped weights."""
        return sum(self._lengths.values())

    def release(self, weights: Iterable[torch.Tensor]) -> None:
        """Let some of the weights leave memory."""
        for weight in weights if self._lengths else ():
            if weight._version == 0 and not weight.requires_grad:
                first, _ = _whole_pages(weight)
                _dont_need(first, self._lengths.get(first, 0))


@contextmanager
def released(model: nn.Module, blocks: list[str]) -> Iterator[None]:
    """Release the mapped weights of every block as soon as it was computed, for the time of a `with` block.

    For passes that nothing is propagated back through: their second reader would read the file again.

    Args:
        model: Captured model.
        blocks: Paths of its blocks.
    """
    pages = MappedPages(model.parameters())
    handles = []
    for name in blocks if pages.bytes() else ():
        hook = lambda module, *_: pages.release(module.parameters())  # noqa: E731 - one line
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Return first and last address of the whole pages of a tensor in this process's memory; the same for none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or type(tensor.data) is not torch.Tensor:
        return 0, 0
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    return first, max(first, last)


def _regions() -> list[tuple[int, int]]:
    """Return start and end of every mapping of a file, under whatever name: caches of hubs link to files of hashes."""
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
