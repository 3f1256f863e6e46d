"""Other people's runtimes load an exported folder as it stands and write the same greedy tokens.

Each is installed into a folder of its own, kept in pytest's cache, because its requirements clash with ours; where no
package index is in reach, its test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format

from irc.runtime.generation import Generator
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

PROMPT = "def parse(text):\n    "
NEW_TOKENS = 24
GENAI = ["onnxruntime-genai>=0.11"]
OPTIMUM = ["optimum>=2.3,<3", "optimum-onnx<1", "transformers>=4.57,<4.58", "huggingface-hub<1", "tokenizers<0.23"]
TRITON = ["tritonclient>=2.60"]

GENERATE_WITH_GENAI = """
import json, sys
import onnxruntime_genai as genai
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
params = genai.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=len(ids) + count)
generator = genai.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)[len(ids):]]))
"""

GENERATE_WITH_OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, ids, count = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True)
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
print(json.dumps(tokens[0, ids.shape[1]:].tolist()))
"""


@pytest.fixture(params=["routed", "dense"])
def folder(request: pytest.FixtureRequest, exported: Path, dense: Path) -> Path:
    return exported if request.param == "routed" else dense


def continuation(folder: Path) -> tuple[list[int], list[int], frozenset[int]]:
    """Return a prompt's ids, what our own runtime continues them with, and the tokens that end a text."""
    generator = Generator(Runtime(folder))
    ids = generator.encode(PROMPT)
    return ids, generator.continue_ids(ids, NEW_TOKENS), generator.end


def run(script: str, packages: Path, folder: Path, ids: list[int]) -> list[int]:
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(folder), json.dumps(ids), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens


@pytest.mark.slow
def test_onnxruntime_genai_writes_the_same_tokens(folder: Path, installed: Callable[..., Path]) -> None:
    packages = installed("genai", GENAI)
    ids, expected, end = continuation(folder)
    found = run(GENERATE_WITH_GENAI, packages, folder, ids)
    assert [token for token in found if token not in end] == expected
    assert len(set(expected)) > 1


@pytest.mark.slow
def test_optimum_writes_the_same_tokens(folder: Path, installed: Callable[..., Path]) -> None:
    packages = installed("optimum", OPTIMUM, ("requests",))
    ids, expected, end = continuation(folder)
    found = run(GENERATE_WITH_OPTIMUM, packages, folder, ids)
    assert [token for token in found if token not in end] == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
@pytest.mark.skipif(installed_library() is None, reason="native operators are not built")
def test_onnxruntime_genai_runs_the_native_operators_of_a_folder(
    bundle: Path, tmp_path: Path, installed: Callable[..., Path], irc_main: Callable[..., Any], dtype: str
) -> None:
    packages, counts, written = installed("genai", GENAI), {}, []
    for kind, more in (("portable", []), ("native", ["--ops-library", "auto"])):
        folder = tmp_path / kind
        assert irc_main("export", bundle, "-o", folder, "--dtype", dtype, *more).code == 0
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        options = config["model"]["decoder"]["session_options"]
        assert options.get("custom_ops_library") == {"portable": None, "native": "libirc_native.so"}[kind]
        assert config["search"]["past_present_share_buffer"] == (kind == "native")
        options["enable_profiling"] = str(tmp_path / f"profile-{kind}")
        path.write_text(json.dumps(config))
        ids, _, _ = continuation(folder)
        written.append(run(GENERATE_WITH_GENAI, packages, folder, ids))
        (trace,) = tmp_path.glob(f"profile-{kind}*.json")
        events = [event for event in json.loads(trace.read_text()) if event.get("cat") == "Node"]
        counts[kind] = sum(event["args"].get("op_name") == "Router" for event in events)
    assert written[0] == written[1]
    assert counts["portable"] == 0 < counts["native"]


def model_config(packages: Path) -> Any:
    """Return Triton's own message type of a model's configuration; its package would import all of gRPC."""
    path = packages / "tritonclient" / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_triton_reads_the_configuration(
    bundle: Path, tmp_path: Path, installed: Callable[..., Path], irc_main: Callable[..., Any]
) -> None:
    types = model_config(installed("triton", TRITON))
    library = '/opt/of "irc"/libirc_native.so'
    options = ["--layout", "triton", "--ops-library", library]
    assert irc_main("export", bundle, "-o", tmp_path / "triton", *options).code == 0
    text = (tmp_path / "triton" / "irc" / "config.pbtxt").read_text()
    config = text_format.Parse(text, types.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("irc", "onnxruntime", 0)
    assert list(config.model_operations.op_library_filename) == [library]
    of_text = text_format.Parse((tmp_path / "triton" / "irc_text" / "config.pbtxt").read_text(), types.ModelConfig())
    assert (of_text.name, of_text.backend) == ("irc_text", "python")
    assert of_text.dynamic_batching.default_queue_policy.max_queue_size == 64
    refused = irc_main("export", bundle, "-o", tmp_path / "other", "--ops-library", library)
    assert refused.code == 2
    assert f"ops_library is {library}, but there is no such file" in refused.sentence()
    auto = irc_main("export", bundle, "-o", tmp_path / "other", "--layout", "triton", "--ops-library", "auto")
    assert (auto.code, "path that it has there" in auto.err) == (2, True)
    cuda = irc_main("export", bundle, "-o", tmp_path / "other", "--provider", "cuda", "--ops-library", "auto")
    assert (cuda.code, "for the CPU alone" in cuda.err) == (2, True)
    assert not (tmp_path / "other").exists()
    session = Runtime(tmp_path / "triton")._session
    kinds = {"tensor(float)": types.TYPE_FP32, "tensor(int64)": types.TYPE_INT64}
    for described, values in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        wanted = [
            (value.name, kinds[value.type], [size if isinstance(size, int) else -1 for size in value.shape])
            for value in values
        ]
        assert [(entry.name, entry.data_type, list(entry.dims)) for entry in described] == wanted
