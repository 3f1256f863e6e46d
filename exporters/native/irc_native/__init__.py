"""Paths of the operator libraries."""

from pathlib import Path


def library_path(provider: str = "cpu") -> Path:
    """Return the shared library that ONNX Runtime registers.

    Args:
        provider: `cpu` or `cuda`; the CUDA library exists if nvcc was found when the package was built.

    Raises:
        FileNotFoundError: The package does not contain it.
    """
    stem = {"cpu": "libirc_native", "cuda": "libirc_native_cuda"}[provider]
    found = sorted(Path(__file__).parent.glob(f"{stem}.*"))
    if not found:
        raise FileNotFoundError(f"{Path(__file__).parent} holds no {stem}; install the package again")
    return found[0]
