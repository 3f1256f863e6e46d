"""Triton Inference Server itself serves an exported repository's model on text.

The server comes from the package nvidia-pytriton, with the Python backend alone; what needs Triton's onnxruntime
backend is held against its message types in test_other_runtimes.py. Skipped where the package cannot be installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from irc.deployment.onnx_folder import ExportOptions, export
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime

ROOT = Path(__file__).parents[3]
PROMPT = "def parse(text):\n    "
SERVER = ["nvidia-pytriton==0.7.0"]
BESIDE = ("numpy<2", "tritonclient[grpc]>=2.60")  # this server's Python backend was built for numpy 1
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def python_with(packages: Path, folder: Path) -> Path:
    """Make an environment that sees those packages, then ours, then this repository; return its programs' folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    seen = (packages, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], ROOT)
    (site / "irc.pth").write_text("\n".join(map(str, seen)) + "\n")
    return folder / "bin"


class Server:
    """A running server; its addresses."""

    def __init__(self, process: Any, http: int, grpc: int, packages: Path) -> None:
        self.process, self.url, self.grpc, self.packages = process, f"http://127.0.0.1:{http}", grpc, packages

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v2/models/irc_text/ready", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, verb: str = "generate", **options: Any) -> str:
        """Return the body of an answer, an error's too."""
        body = json.dumps(options).encode()
        request = urllib.request.Request(f"{self.url}/v2/models/irc_text/{verb}", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()


@pytest.fixture(scope="module")
def server(
    bundle: Path,
    installed: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared library, which Triton's Python backend loads")
    packages = installed("pytriton", SERVER, BESIDE)
    work = tmp_path_factory.mktemp("triton")
    export(str(bundle), work / "repository", ExportOptions(layout="triton"))
    found = packages / "pytriton" / "tritonserver"
    backend = Path(shutil.copytree(found / "backends", work / "backends"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = found / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"the package has no Python backend for Python {version}")
    shutil.copy(stub, backend / "python")
    libraries = (sysconfig.get_config_var("LIBDIR"), found / "external_libs", packages / "nvidia_pytriton.libs")
    programs = python_with(packages, work / "python")
    http, grpc = free_port(), free_port()
    options = {
        "model-repository": work / "repository",
        "backend-directory": backend,
        "model-control-mode": "explicit",
        "load-model": "irc_text",
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
        "exit-timeout-secs": 5,
    }
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    environment.pop("PYTHONPATH", None)
    said = work / "log"
    with said.open("wb") as log:
        command = [str(found / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    running = Server(process, http, grpc, packages)
    end = time.monotonic() + 240
    while not running.ready():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"Triton did not load the model:\n{said.read_text(errors='replace')[-3000:]}")
        time.sleep(0.3)
    yield running
    process.terminate()
    process.wait(60)


@pytest.fixture
def expected(exported: Path) -> Any:
    return Generator(Runtime(exported)).generate(PROMPT, max_tokens=20)


def test_it_gives_our_runtime_s_text(server: Server, expected: Any) -> None:
    answer = json.loads(server.ask(prompt=PROMPT, max_tokens=20))
    assert (answer["text"], answer["stopped"]) == (expected.text, expected.stopped)
    assert answer["skipped"] == pytest.approx(expected.skipped, abs=1e-6)


def test_it_streams(server: Server, expected: Any) -> None:
    lines = server.ask("generate_stream", prompt=PROMPT, max_tokens=20, stream=True).splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(piece["text"] for piece in pieces) == expected.text
    assert len(pieces) > 3
    assert [piece["stopped"] for piece in pieces if piece["stopped"]] == [expected.stopped]


def test_it_stops_and_samples(server: Server, exported: Path, expected: Any) -> None:
    mark = expected.text[5:7]
    stopped = json.loads(server.ask(prompt=PROMPT, max_tokens=20, stop=[mark]))
    assert (stopped["text"], stopped["stopped"]) == (expected.text[: expected.text.index(mark)], "stop")
    one, same, other = (
        json.loads(server.ask(prompt=PROMPT, max_tokens=12, temperature=1.0, top_k=50, seed=seed))["text"]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": ""}, "the prompt has no token"),
        ({"prompt": "x" * 500}, "the model's context is 64"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0; give 1 or more"),
        ({"prompt": "x", "temperature": -1.0}, "temperature is -1.0; give 0 (greedy)"),
        ({"prompt": "x", "seed": -1}, "seed is -1; give 0 or more"),
        ({"prompt": "x", "tokens": 1}, "tokens is not an option; choose from max_tokens"),
        ({}, "prompt"),
    ],
)
def test_it_refuses_by_a_sentence_and_goes_on(server: Server, options: dict[str, Any], sentence: str) -> None:
    answer = json.loads(server.ask(**options))
    assert sentence in answer["error"]
    assert "text" in json.loads(server.ask(prompt="x", max_tokens=1))


def test_the_example_client(server: Server, expected: Any) -> None:
    command = [sys.executable, str(ROOT / "examples" / "triton_client.py"), PROMPT, "--max-tokens", "20"]
    environment = {**os.environ, "PYTHONPATH": str(server.packages)}
    done = subprocess.run(
        [*command, "--url", f"127.0.0.1:{server.grpc}"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text
    stopped, skipped = re.fullmatch(r"\n(\w+); ([\d.]+)% of the units' work skipped\n", done.stderr).groups()
    assert stopped == expected.stopped
    assert float(skipped) == pytest.approx(100 * expected.skipped, abs=0.1)
    nowhere = subprocess.run(
        [*command, "--url", f"127.0.0.1:{free_port()}"], capture_output=True, text=True, env=environment, check=False
    )
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("no text from the server")
    assert "Traceback" not in nowhere.stderr
