"""Where the operator library lies."""

from pathlib import Path


def library_path() -> Path:
    """Return the shared library that ONNX Runtime registers."""
    found = sorted(Path(__file__).parent.glob("libirc_native.*"))
    if not found:
        raise FileNotFoundError(f"{Path(__file__).parent} holds no libirc_native; install the package again")
    return found[0]
