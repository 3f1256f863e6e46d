"""Compare two routing policies on a tiny model, from Python, as `irc compare` does.

    python examples/compare_policies.py

The model is tiny and trains for a few steps, so the figures say nothing about your model. Each combination of policy
and sparsity is a bundle in OUTPUT/cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny_llama import model_and_text

from irc import console
from irc.compare.cells import Plan
from irc.compare.run import compare
from irc.recipe.recipe import Recipe
from irc.recipe.stages import LffRecipe, RouterRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/policies"))
    parser.add_argument("--policies", nargs="+", default=["informed", "skipgpt"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25])
    arguments = parser.parse_args()
    model, text = model_and_text()
    recipe = Recipe(
        model=str(model),
        data=str(text),
        seq_len=128,
        eval_tokens=8192,
        yardstick_tokens=1024,
        device="cpu",
        lff=LffRecipe(tokens=16_384, steps=20),
        router=RouterRecipe(steps=40, teach_steps=10, calibration_tokens=16_384),
    )
    plan = Plan(policies=arguments.policies, sparsities=arguments.sparsities)
    results = compare(plan, recipe, arguments.output, console.progress, force=True)
    for cell in results["cells"]:
        figures = cell["figures"]
        ratio, realized = figures["perplexity"]["ratio"], figures["sparsity"]["realized"]
        print(f"{cell['policy']:<10} perplexity {ratio:.3f} x dense at sparsity {realized:.3f}")


if __name__ == "__main__":
    main()
