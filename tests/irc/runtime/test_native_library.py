"""Which operator library serves a model, and what is said where none does."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from irc.errors import InputError
from irc.runtime import native
from irc.runtime.native import NativeLibrary, choose_library, installed_library, load_library

LIBRARY = installed_library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the native operator library is not installed")


def _library(version: int = 1, types: tuple[str, ...] = ("fp32",)) -> NativeLibrary:
    return NativeLibrary(Path("libirc_native.so"), "0", version, {"cpu": types}, "baseline")


@needs_library
def test_the_installed_library_serves_all_types_on_cpu() -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        assert choose_library("auto", "cpu", dtype) == choose_library("native", "cpu", dtype) == LIBRARY
    assert LIBRARY is not None
    assert choose_library(str(LIBRARY.path), "cpu", "fp32") == LIBRARY
    assert choose_library("portable", "cpu", "fp32") is None


@pytest.mark.parametrize(
    ("library", "provider", "dtype", "reason"),
    [
        (_library(version=9), "cpu", "fp32", "version 9 of domain irc, models have 1"),
        (_library(), "cpu", "fp16", "cpu kernels are for fp32, the model is fp16"),
    ],
)
def test_a_misfit_is_an_error_when_asked_for_and_a_warning_else(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    library: NativeLibrary,
    provider: str,
    dtype: str,
    reason: str,
) -> None:
    monkeypatch.setattr(native, "installed_library", lambda provider="cpu": library)
    with pytest.raises(InputError, match=reason):
        choose_library("native", provider, dtype)
    monkeypatch.setattr(logging.getLogger("irc"), "propagate", True)
    with caplog.at_level(logging.WARNING, "irc"):
        assert choose_library("auto", provider, dtype) is None
    assert reason in caplog.text


def test_on_cuda_only_who_asks_gets_native_operators_and_hears_that_they_are_untried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = NativeLibrary(Path("libirc_native_cuda.so"), "0", 1, {"cuda": ("fp32",)}, "sm_80, sm_90", cuda="13.0")
    monkeypatch.setattr(native, "installed_library", lambda provider="cpu": library if provider == "cuda" else None)
    monkeypatch.setattr(logging.getLogger("irc"), "propagate", True)
    assert choose_library("auto", "cuda", "fp32") is None
    with caplog.at_level(logging.WARNING, "irc"):
        assert choose_library("native", "cuda", "fp32") == library
    assert "compiled, not yet run on a GPU" in caplog.text
    with pytest.raises(InputError, match="cuda kernels are for fp32, the model is bf16"):
        choose_library("native", "cuda", "bf16")
    monkeypatch.setattr(native, "installed_library", lambda provider="cpu": None)
    with pytest.raises(InputError, match=r"no CUDA library in package irc_native; install .* where nvcc is found"):
        choose_library("native", "cuda", "fp32")


@needs_library
def test_the_library_for_the_cpu_does_not_serve_cuda() -> None:
    assert LIBRARY is not None
    with pytest.raises(InputError, match="no kernels for cuda, only for cpu"):
        choose_library(str(LIBRARY.path), "cuda", "fp32")


def test_the_installed_cuda_library_describes_itself_and_registers_without_a_gpu() -> None:
    library = installed_library("cuda")
    if library is None:
        pytest.skip("the package was built without nvcc: there is no CUDA library")
    assert dict(library.providers) == {"cuda": ["fp32", "fp16", "bf16"]}
    assert {"sm_80", "sm_90"} <= set(library.instruction_set.split(", "))
    assert int(library.cuda.split(".")[0]) >= 12
    assert library.cache_with_room
    onnxruntime.SessionOptions().register_custom_ops_library(str(library.path))
    with pytest.raises(InputError, match="no kernels for cpu, only for cuda"):
        choose_library(str(library.path), "cpu", "fp32")


def test_without_the_package_auto_is_portable_and_native_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PACKAGE", "no_such_package_anywhere")
    assert choose_library("auto", "cpu", "fp32") is None
    with pytest.raises(InputError, match=r"not installed; build it with pip install \./exporters/native"):
        choose_library("native", "cpu", "fp32")


def test_what_is_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.so"):
        load_library(tmp_path / "missing.so")
    with pytest.raises(InputError, match="File name too long"):
        load_library(Path("x" * 400))
    text = tmp_path / "text.so"
    text.write_text("no shared library")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_library(text)
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    for source, message in (
        ("int other;", "lacks irc_native_describe"),
        ('extern "C" const char* irc_native_describe() { return "no JSON"; }', "describes itself"),
    ):
        built = tmp_path / f"{len(source)}.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", built], input=source, text=True, check=True
        )
        with pytest.raises(InputError, match=message):
            load_library(built)
