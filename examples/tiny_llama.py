"""Train the tiny Llama that the other examples use by default, and write its tokenizer and text.

    python examples/tiny_llama.py    # takes seconds; writes build/tiny/model and build/tiny/text

The model has 115,000 parameters and one token per byte. It is trained for 300 steps on a few files of the Python
standard library.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER, BUNDLE = Path("build/tiny"), Path("build/your-own/bundle")
WINDOW = 128
MODULES = """argparse ast base64 bdb calendar cmd codecs configparser contextlib copy csv dataclasses difflib dis
    doctest enum fractions functools gettext gzip heapq imaplib inspect ipaddress locale mailbox optparse os pathlib
    pdb pickle platform plistlib pprint random shutil socket ssl statistics string subprocess tarfile tempfile textwrap
    threading tokenize trace traceback typing uuid warnings weakref zipapp""".split()


def write_text(folder: Path) -> Path:
    """Copy some files of the standard library; `load_text` splits a folder of many files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        source = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if source.is_file():  # not every Python has every module
            shutil.copyfile(source, folder / source.name)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and end-of-text token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def write_model(folder: Path, text: Path, steps: int = 300) -> Path:
    """Train a small Llama and save it in the format of transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
    content = "\n".join(path.read_text(encoding="utf-8") for path in sorted(text.glob("*.py")))
    stream = torch.tensor(tokenizer(content)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - WINDOW, (8,))
        batch = torch.stack([stream[start : start + WINDOW] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"tiny model: {sum(p.numel() for p in model.parameters()):,} parameters, last loss {loss.item():.2f} nats")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_and_text(folder: Path = FOLDER) -> tuple[Path, Path]:
    """Return the folders of the model and of the text, and create them if they do not exist."""
    model, text = folder / "model", folder / "text"
    if not (model / "tokenizer.json").is_file():
        write_model(model, write_text(text))
    return model, text


def converted() -> Path:
    """Return the bundle of the tiny model, and run `convert_your_own.py` if it does not exist."""
    if not (BUNDLE / "irc_config.json").is_file():
        script = Path(__file__).with_name("convert_your_own.py")
        subprocess.run([sys.executable, str(script), "-o", str(BUNDLE)], check=True)
    return BUNDLE


if __name__ == "__main__":
    print(*model_and_text(), sep="\n")
