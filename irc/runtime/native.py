"""Finds the native operator library and tells whether it fits a model: its provider, types and domain version.

The libraries, one for each provider, are a package of their own (`exporters/native`). They are loaded from there or
from a path that the user gives, never from a model's folder.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.onnx_format import VERSION
from irc.errors import InputError

log = logging.getLogger(__name__)

PACKAGE = "irc_native"
CHOICES = ("auto", "native", "portable")  # anything else is the path of a library
_CHOICES = "use auto, native, portable or the path of an operator library"
_HOW = "build it with pip install ./exporters/native (it needs a C++ compiler)"
_HOW_CUDA = "install ./exporters/native again where nvcc is found"
UNTRIED = "compiled, not yet run on a GPU"


@dataclass(frozen=True)
class NativeLibrary:
    """An operator library that was loaded.

    Attributes:
        path: The shared library.
        version: Its own version.
        domain_version: Version of the ONNX domain `irc` that its kernels implement.
        providers: The data types (fp32, fp16, bf16) of its kernels, by provider (cpu, cuda).
        instruction_set: What its CPU kernels use here; for a CUDA library, the GPU architectures it has code for.
        cache_with_room: Whether its RoutedAttention writes to a cache in place.
        cuda: Version of CUDA that a CUDA library was built with, empty for the CPU.
    """

    path: Path
    version: str
    domain_version: int
    providers: Mapping[str, Sequence[str]]
    instruction_set: str
    cache_with_room: bool = False
    cuda: str = ""

    def misfit(self, provider: str, dtype: str) -> str:
        """Return why it cannot serve a model on a provider, empty where it can."""
        if self.domain_version != VERSION:
            return f"it implements version {self.domain_version} of domain irc, models have {VERSION}; {_HOW} again"
        if provider not in self.providers:
            return f"it has no kernels for {provider}, only for {', '.join(self.providers)}"
        if dtype not in self.providers[provider]:
            return f"its {provider} kernels are for {', '.join(self.providers[provider])}, the model is {dtype}"
        return ""


def installed_library(provider: str = "cpu") -> NativeLibrary | None:
    """Return a library of the installed package, None if there is none.

    Args:
        provider: `cpu` or `cuda`; without nvcc the package is built without a CUDA library.

    Raises:
        InputError: The library is installed but cannot be loaded.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        return None
    try:
        path = Path(package.library_path(provider) if provider != "cpu" else package.library_path())
    except (AttributeError, OSError, TypeError) as error:
        if provider != "cpu":
            return None
        raise InputError(f"package {PACKAGE}: {error}") from error
    return load_library(path)


def load_library(path: Path) -> NativeLibrary:
    """Load a library and ask it what it is.

    Raises:
        InputError: It is missing, built for another machine, or not an operator library of irc.
    """
    try:
        there = path.is_file()
    except OSError as error:
        raise InputError(f"ops is '{str(path)[:80]}': {error.strerror}; {_CHOICES}", options=("ops",)) from error
    if not there:
        raise InputError(f"no operator library '{path}'; {_CHOICES}", options=("ops",))
    try:
        describe = ctypes.CDLL(str(path.resolve())).irc_native_describe
    except OSError as error:
        raise InputError(f"{path}: the operator library cannot be loaded ({error}); {_HOW} on this machine") from error
    except AttributeError as error:
        raise InputError(f"{path}: this is not an operator library of irc (it lacks irc_native_describe)") from error
    describe.restype = ctypes.c_char_p
    try:
        found = json.loads(describe().decode())
        return NativeLibrary(
            path.resolve(),
            str(found["version"]),
            int(found["domain_version"]),
            {str(provider): [str(name) for name in names] for provider, names in found["providers"].items()},
            str(found["instruction_set"]),
            found.get("cache_with_room") is True,
            str(found.get("cuda", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the operator library describes itself in an unknown way; {_HOW} again") from error


def choose_library(ops: str, provider: str, dtype: str) -> NativeLibrary | None:
    """Return the library that serves a model; None means the portable bodies in its file.

    Args:
        ops: `portable`; `native`, the installed library; `auto`, the installed library if it fits (with a warning if it
            is there and does not fit), on CUDA always the portable bodies; or the path of a library.
        provider: `cpu` or `cuda`.
        dtype: Data type of the model: fp32, fp16 or bf16.

    Raises:
        InputError: A library was asked for that is missing or does not fit.
    """
    if ops == "portable":
        return None
    if ops == "auto":
        if provider == "cuda":
            log.info("native CUDA operators are used only if ops is native: they are %s", UNTRIED)
            return None
        try:
            library = installed_library()
            reason = library.misfit(provider, dtype) if library else ""
        except InputError as error:
            library, reason = None, str(error)
        if reason:
            log.warning("native operators are not used, portable ones are: %s", reason)
        return None if reason else library
    library = installed_library(provider) if ops == "native" else load_library(Path(ops))
    if library is None and provider == "cuda":
        raise InputError(f"ops is native, but there is no CUDA library in package {PACKAGE}; {_HOW_CUDA}")
    if library is None:
        raise InputError(f"ops is native, but package {PACKAGE} is not installed; {_HOW}")
    if reason := library.misfit(provider, dtype):
        raise InputError(f"ops is {ops}, but the library does not fit: {reason}")
    if provider == "cuda":
        log.warning("%s: these CUDA operators are %s; compare with ops portable", library.path, UNTRIED)
    return library
