"""Convert your own Llama into a bundle from Python, print its figures, and generate text with it.

    python examples/convert_your_own.py                                        # trains and converts a tiny model
    python examples/convert_your_own.py --model MODEL --data TEXT --sparsity 0.4 --steps 200

MODEL is a folder with a Llama, Mistral, Qwen2 or Qwen3 and its tokenizer, as transformers saves them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_llama import BUNDLE, model_and_text

import irc
from irc import console
from irc.conversion.pipeline import convert
from irc.recipe.recipe import Recipe
from irc.recipe.stages import LffRecipe, RouterRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=BUNDLE)
    parser.add_argument("--model", type=Path, help="Folder of your model.  [default: the tiny model]")
    parser.add_argument("--data", help="Your text: a file or a folder.  [default: the text of the tiny model]")
    parser.add_argument("--sparsity", type=float, default=0.25, help="Share of (token, unit) pairs to skip.")
    parser.add_argument("--steps", type=int, default=40, help="Steps of the router stage.")
    arguments = parser.parse_args()
    tiny, text = model_and_text()

    recipe = Recipe(
        model=str(arguments.model or tiny),
        data=arguments.data or str(text),
        sparsity=arguments.sparsity,
        seq_len=128,
        eval_tokens=8192,
        yardstick_tokens=1024,
        device="cpu",
        lff=LffRecipe(tokens=16_384, steps=20),
        router=RouterRecipe(steps=arguments.steps, teach_steps=10, calibration_tokens=16_384),
    )
    metrics = convert(recipe, arguments.output, console.progress, force=True)
    perplexity, sparsity = metrics["perplexity"], metrics["sparsity"]
    print(f"perplexity {perplexity['dense']:.3f} dense, {perplexity['routed']:.3f} routed")
    print(f"sparsity {sparsity['realized']:.3f} (attention {sparsity['attention']:.3f}, FFN {sparsity['ffn']:.3f})")

    model = irc.load(arguments.output)
    tokenizer = model.base.tokenizer
    prompt = tokenizer("def read(", return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    written = model.generate(prompt, max_new_tokens=80, do_sample=True, temperature=0.7)
    print(tokenizer.decode(written[0]))
    print(f"bundle: {arguments.output}")


if __name__ == "__main__":
    main()
