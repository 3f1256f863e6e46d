"""Let the dense model and a bundle at several FLOPs ratios answer the same questions, one below the other.

    python examples/side_by_side.py BUNDLE --flops 0.9 0.8

Answers are greedy, in eager PyTorch, through the model's chat template if it has one. The questions are fixed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import irc
from irc.model.routed import RoutedForCausalLM
from irc.training.lora import adapters_off

QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in three sentences how a refrigerator keeps food cold.",
    "Write the opening of a story about a lighthouse keeper.",
]


def tokens_of(tokenizer: PreTrainedTokenizerBase, question: str) -> torch.Tensor:
    """Return a question as int64 [1, tokens]."""
    if not tokenizer.chat_template:
        return torch.tensor([tokenizer(question)["input_ids"]])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def answer(model: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """Return a model's likeliest continuation of a question."""
    ids = tokens_of(tokenizer, question)
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--flops", type=float, nargs="+", help="FLOPs ratios within the dial.  [default: the bundle's]")
    parser.add_argument("--question", action="append", help="Ask this in place of the fixed questions; repeatable.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens of each answer.")
    given = parser.parse_args()

    questions = given.question or QUESTIONS
    answers: dict[str, list[str]] = {}
    for flops in given.flops or [None]:
        model = irc.load(given.bundle, flops=flops)
        tokenizer = model.base.tokenizer
        if not answers:
            with adapters_off(model), model.control.using(mode="execute"):
                answers["dense"] = [answer(model, tokenizer, question, given.tokens) for question in questions]
        name = "routed" if flops is None else f"FLOPs {flops:g}"
        answers[name] = [answer(model, tokenizer, question, given.tokens) for question in questions]
    for number, question in enumerate(questions):
        print(f"> {question}\n")
        for name, texts in answers.items():
            print(f"[{name}]\n{texts[number]}\n")


if __name__ == "__main__":
    main()
