"""The short examples run without changes, and examples/README.md lists every example."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each example must print. They run in this order in one folder, so that later ones reuse the tiny model.
SHORT = {
    "convert_your_own.py": (r"perplexity [\d.]+ dense, [\d.]+ routed", r"bundle: build/your-own/bundle"),
    "write_a_pass.py": (r"2 SiLU before, 0 after, 2 hard swish", r"changed: True; .*: False"),
    "export_and_run.py": (r"exported 4 routed units", r"ONNX Runtime and PyTorch give the same tokens"),
    "side_by_side.py": (r"> What is the capital of France", r"\[dense\]\n", r"\[routed\]\n"),
    "inspect_in_a_browser.py": (r"120 tokens, 0\.\d+ of the", r"page: build/your-own/routes.html"),
    "compare_policies.py": (r"informed +perplexity [\d.]+ x dense", r"skipgpt +perplexity [\d.]+ x dense"),
    "train_on_two_processes.py": (
        r"largest difference of \d+ weight tensors between one process and two: [\d.]+e-0[5-9]",
    ),
    "real_model.py": (
        r"tiny.gguf at 0.9 of its FLOPs",
        r"convert \d+ s, evaluate \d+ s, export and verify \d+ s",
        r"4 of 4 continuations are identical",
        r"> What is the capital of France\?",
    ),
    "convert_at_scale.py": (
        r"tiny.json: 0.0\d GB of weights, 2 steps of 2 x 32 tokens",
        *(
            rf"{phase} +[\d.]+ +[\d.]+ +0\.\d+ +0\.\d+ +0\.\d+"
            for phase in (
                "convert: capture",
                "convert: lff",
                "convert: router",
                "convert: evaluate",
                "convert: texts",
                "convert",
                "eval",
                "export",
            )
        ),
    ),
}
ARGUMENTS = {
    "side_by_side.py": "build/your-own/bundle --tokens 4",
    "real_model.py": "--gguf tiny.gguf --flops 0.9 --steps 2 --tokens 256 --seq-len 16 --data words.txt --device cpu",
    "convert_at_scale.py": "--shape tiny.json --folder build/tiny-scale --steps 2 --batch 2 --seq-len 32 --tokens 256",
}
TINY_SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
SECONDS = 180  # what examples/README.md promises on a CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def write_tiny_gguf(folder: Path) -> None:
    pytest.importorskip("gguf")
    from tests.irc.gguf_files import tiny_llama, write_gguf

    torch.manual_seed(0)
    write_gguf(folder / "tiny.gguf", LlamaForCausalLM(tiny_llama()), types=("F16", "Q8_0", "Q4_0"))
    words = "the router skips a token of the model and the other token runs".split()
    (folder / "words.txt").write_text("\n".join(" ".join(words[i % 5 : i % 13]) for i in range(2000)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_an_example_runs(name: str, folder: Path) -> None:
    paths = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    (folder / "tiny.json").write_text(json.dumps(TINY_SHAPE))
    if name == "real_model.py":
        write_tiny_gguf(folder)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, "").split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in SHORT[name]:
        assert re.search(expected, done.stdout), done.stdout[-3000:]
    if name == "convert_at_scale.py":
        assert not (folder / "build/tiny-scale").exists()
    if name == "inspect_in_a_browser.py":
        assert "<html" in (folder / "build/your-own/routes.html").read_text(encoding="utf-8")


def test_the_table_names_every_example_and_no_other() -> None:
    named = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_it_is_run(path: Path) -> None:
    first = path.read_text().split('"""')[1]
    assert f"python examples/{path.name}" in first
