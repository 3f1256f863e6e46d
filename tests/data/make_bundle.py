"""Make the frozen bundle of the present format: a tiny random Llama, its conversion with every part, and its figures.

    python tests/data/make_bundle.py       # writes tests/data/bundle-vN, N the format version

Run it once after `irc.bundle.config.FORMAT_VERSION` has grown, and commit the folder. Folders of older versions are
never made again. Each holds `model` (the base), `bundle`, `text.txt` and `expected.json`, the figures of `irc eval`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irc import console
from irc.bundle.layout import CONFIG, FORMAT_VERSION, LORA, METRICS, RECIPE
from irc.bundle.source import ModelSource
from irc.conversion.pipeline import convert
from irc.evaluation.run import TextChoice, run_evaluation
from irc.recipe.recipe import Recipe
from irc.recipe.stages import LffRecipe, LoraRecipe, RouterRecipe

FOLDER = Path(__file__).parent / f"bundle-v{FORMAT_VERSION}"
DIAL = [0.2, 0.5]


def write_model(folder: Path) -> None:
    """Save a random Llama whose tokens are bytes."""
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder
    )


def write_text(path: Path) -> None:
    """Write 12 kB of sentences from a few words."""
    words = "the a token router unit layer reads writes skips keeps slowly often every model small deep".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(4, 12))) + "." for _ in range(270)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def forget_places(bundle: Path) -> None:
    """Put relative names where the conversion wrote where it ran; no hash covers these files."""
    config = json.loads((bundle / CONFIG).read_text())
    config["base"]["name"] = "model"
    config["data"]["name"] = "text.txt"
    (bundle / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    recipe = yaml.safe_load((bundle / RECIPE).read_text()) | {"model": "model", "data": "text.txt"}
    (bundle / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    metrics = json.loads((bundle / METRICS).read_text()) | {"model": "model", "output": "bundle"}
    metrics["data"]["name"] = "text.txt"
    (bundle / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    (bundle / "README.md").write_text("# An informed-routing bundle\n\nFrozen for tests.\n")
    (bundle / LORA / "README.md").unlink(missing_ok=True)


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER.name} exists: a frozen bundle is not made again")
    model, text, bundle = FOLDER / "model", FOLDER / "text.txt", FOLDER / "bundle"
    write_model(model)
    write_text(text)
    recipe = Recipe(
        model=str(model),
        data=str(text),
        stages=["lff", "router", "lora"],
        dial=DIAL,
        kv_policy="reduced",
        kv_threshold=0.2,
        rank=2,
        seq_len=32,
        eval_tokens=0,
        device="cpu",
        precision="fp32",
        lff=LffRecipe(tokens=4096, steps=5, batch_size=4),
        router=RouterRecipe(steps=20, teach_steps=5, batch_size=4, calibration_tokens=4096),
        lora=LoraRecipe(steps=5, batch_size=4, rank=2),
    )
    convert(recipe, bundle, console.progress)
    forget_places(bundle)
    source = ModelSource(str(bundle), str(model), device="cpu")
    choice = TextChoice(str(text), split="all", tokens=0)
    found = run_evaluation(source, console.progress, choice, sparsities=DIAL)
    kept = {key: found[key] for key in ("perplexity", "sparsity", "flops_ratio", "kv", "units", "sparsity_sweep")}
    (FOLDER / "expected.json").write_text(json.dumps(kept, indent=2) + "\n")
    console.say(f"wrote {FOLDER.name}")


if __name__ == "__main__":
    main()
