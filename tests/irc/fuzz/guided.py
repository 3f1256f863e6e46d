"""Fuzzes one loader with atheris, which keeps mutations that reach new code and mutates them further.

    python guided.py TARGET FOLDER SECONDS [SEED]

FOLDER is emptied and receives the files that the loader reads, the corpus, and a copy of an input that fails. The
process exits with 0 after SECONDS. It exits with another code and a traceback if the loader raises anything but
InputError, takes 20 seconds for one input, or 4 GB of memory. `total.json` counts inputs and bytes.
"""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parents[2] / "data" / "bundle-v1"
BUNDLE, MODEL = DATA / "bundle", DATA / "model"
Target = tuple[Path, Callable[[], object]]


def recipe(folder: Path) -> Target:
    from irc.conversion.pipeline import resolve
    from irc.recipe.recipe import load_recipe

    path = Path(shutil.copy(BUNDLE / "recipe.yaml", folder))
    return path, lambda: resolve(load_recipe(path))


def bundle_config(folder: Path) -> Target:
    from irc.bundle.config import read_config
    from irc.bundle.layout import CONFIG

    shutil.copytree(BUNDLE, folder, dirs_exist_ok=True)
    return folder / CONFIG, lambda: read_config(folder)


def adapter(folder: Path) -> Target:
    """Forecasters and routers of a bundle, with the right hash."""
    from irc.bundle.layout import ADAPTER
    from irc.bundle.loading import read_adapter
    from irc.files.atomic import file_sha256

    shutil.copytree(BUNDLE, folder, dirs_exist_ok=True)
    path = folder / ADAPTER
    return path, lambda: read_adapter(folder, file_sha256(path))


def checkpoint(folder: Path) -> Target:
    """A shard of weights, as read before the weights are used."""
    from irc.model.checkpoint import find_base

    def load() -> None:
        base = find_base(str(folder))
        base.check_sizes(base.weights())

    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    return folder / "model.safetensors", load


def model_config(folder: Path) -> Target:
    _, load = checkpoint(folder)
    return folder / "config.json", load


def manifest(folder: Path) -> Target:
    from exporters.onnx_format import MANIFEST
    from irc.deployment.onnx_folder import export
    from irc.runtime.folder import open_folder

    onnx = folder / "onnx"
    export(str(MODEL), onnx)
    return onnx / MANIFEST, lambda: open_folder(onnx)


def onnx_model(folder: Path) -> Target:
    from irc.deployment.model_file import read_model
    from irc.deployment.onnx_folder import export

    onnx = folder / "onnx"
    export(str(MODEL), onnx)
    return onnx / "model.onnx", lambda: read_model(onnx / "model.onnx", ["model.onnx.data"])


TARGETS = {
    each.__name__: each for each in (recipe, bundle_config, adapter, checkpoint, model_config, manifest, onnx_model)
}
"""The loaders. Each takes an empty folder and returns the file to mutate and the function that loads it."""


def main() -> None:
    import atheris

    from irc.errors import InputError

    target, where, seconds, *seed = sys.argv[1:]
    folder = Path(where)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("read", "corpus"):
        (folder / name).mkdir(parents=True)
    for library in ("torch", "transformers", "numpy", "onnx"):  # not instrumented: it would slow them down
        importlib.import_module(library)
    with atheris.instrument_imports(include=["irc", "yaml"]):
        path, load = TARGETS[target](folder / "read")
    original = path.read_bytes()
    (folder / "corpus" / "original").write_bytes(original)
    (folder / "words").write_text(_words(original))
    total = {"inputs": 0, "bytes": 0, "refused": 0}

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        total["inputs"] += 1
        total["bytes"] += len(data)
        try:
            load()
        except InputError as error:
            if not str(error).strip():
                raise AssertionError("a refusal without a sentence") from error
            total["refused"] += 1
        if total["inputs"] % 100 == 0:  # libFuzzer exits without returning here
            (folder / "total.json").write_text(json.dumps(total))

    # Linux counts the memory of the parent process in the peak of its child.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 4096
    options = [f"-max_total_time={seconds}", "-timeout=20", f"-rss_limit_mb={limit}", f"-max_len={2 * len(original)}"]
    options += ["-reduce_inputs=0", "-len_control=0", f"-seed={seed[0] if seed else 1}", "-print_final_stats=1"]
    options += [f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *options], feed)
    atheris.Fuzz()


def _words(original: bytes) -> str:
    """Return a dictionary for libFuzzer: words of the file, and values that no valid file contains."""
    words = {word for word in original[:20000].replace(b'"', b" ").split() if 2 < len(word) < 30 and word.isalnum()}
    words |= {b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 30, b"../x", b"{}", b"[]", b"&a [*a]", b"!!int ''"}
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in sorted(words))


if __name__ == "__main__":
    main()
