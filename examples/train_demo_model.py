"""Train the embedded `demo` model from scratch on the sources of the Python standard library.

    python examples/train_demo_model.py -o irc/demo --steps 2000

The model is a Llama of 7 million parameters with a byte-level BPE tokenizer. It is trained on the train splits of
`stdlib` and of its test suite, which takes about an hour on 2 CPU cores and minutes on a GPU. It sees no held-out file
of either. A checkpoint is written to build/demo-training/ every 100 steps; run the same command again to resume.
Muon trains the hidden matrices and AdamW the embeddings and norms. The learning rate is constant, then falls linearly
over the last third of the steps, in which the windows are twice as long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irc.text.source import load_text, token_stream, windows

VOCABULARY = 4096
CONTEXT = 512
TOKENS_PER_STEP = 4096
PEAK_LR = 3e-3
WARM_UP = 100
DECAY_SHARE = 1 / 3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 4,096 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model: 8 layers, hidden 256, 8 query and 4 key/value heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for all other parameters."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: it warms up, stays at its peak, then falls linearly to 2 % of it."""
    decay_from = int(steps * (1 - DECAY_SHARE))
    if step < decay_from:
        return PEAK_LR * min(1.0, (step + 1) / WARM_UP)
    return PEAK_LR * max(0.02, (steps - step) / (steps - decay_from))


def batch_at(step: int, steps: int, stream: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw the windows of one step. They depend only on seed and step, so resuming changes nothing."""
    length = CONTEXT // 2 if step < steps * (1 - DECAY_SHARE) else CONTEXT
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, stream.numel() - length, (TOKENS_PER_STEP // length,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """Return the mean next-token loss over held-out windows, in nats."""
    model.eval()
    total = sum(model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in held_out.split(8))
    model.train()
    return total / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("irc/demo"))
    parser.add_argument("--work", type=Path, default=Path("build/demo-training"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)

    source = load_text("stdlib")
    train_documents = source.split("train")
    tokenizer = train_tokenizer([document.text for document in train_documents])
    train_documents += load_text("stdlib-tests").split("train")
    stream = token_stream(train_documents, tokenizer).to(arguments.device)
    held_out = windows(token_stream(source.split("heldout"), tokenizer), CONTEXT).to(arguments.device)
    print(f"train {stream.numel():,} tokens, held out {held_out.numel():,}", flush=True)

    model = build_model(arguments.seed).to(arguments.device).train()
    optimizers = build_optimizers(model)
    checkpoint = arguments.work / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        print(f"resuming at step {first}", flush=True)

    started = time.time()
    for step in range(first, arguments.steps):
        batch = batch_at(step, arguments.steps, stream, arguments.seed)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps)
        with torch.autocast(arguments.device.partition(":")[0], torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step + 1 - first) * TOKENS_PER_STEP / (time.time() - started)
            print(f"step {step} loss {loss.item():.4f} {rate:,.0f} tokens/s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        if (step + 1) % 500 == 0:
            loss_now = heldout_loss(model, held_out[::8, : CONTEXT // 2])
            print(
                f"step {step + 1} held-out loss (256-token windows) {loss_now:.4f} ppl {math.exp(loss_now):.2f}",
                flush=True,
            )

    final = model.to(torch.bfloat16)
    loss_now = heldout_loss(final.float(), held_out)
    final = final.to(torch.bfloat16)
    final.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    facts = {
        "data": "stdlib and stdlib-tests, train splits",
        "train_tokens": stream.numel(),
        "heldout_tokens": held_out.numel(),
        "steps": arguments.steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "heldout_loss": loss_now,
        "heldout_perplexity": math.exp(loss_now),
        "seed": arguments.seed,
    }
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
