"""The tokenizer of exported folders gives the ids and texts of the one that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from irc.deployment import tokenizer_files
from irc.deployment.tokenizer_files import write_tokenizer
from irc.errors import InputError
from irc.model.checkpoint import find_base
from irc.text.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = [
    *(
        "",
        " ",
        "the router",
        "  two  spaces\n\tand a tab\r\n",
        "def f(x):\n    return x'y",
        "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600",
    ),
    *(
        "it 's n't so , is it ? no . yes ! a ' b",
        "<s>the</s>",
        "<|end|>",
        "a<|end|>b",
        "a <more> b<more>",
        "un<unk>known",
    ),
]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    """Bytes, a few merges, and an added token that is not special."""
    words = [*LETTERS, "th", "the", "er"]
    merges = [("t", "h"), ("th", "e"), ("e", "r")]
    plain = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_tokens([AddedToken("<more>", lstrip=True)])
    plain.enable_truncation(5)  # as some files keep it; transformers turns both off
    plain.enable_padding(length=20)
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def with_beginning() -> PreTrainedTokenizerFast:
    made = byte_level(bos_token="<s>", eos_token="</s>")
    begin = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", made.bos_token_id)])
    made.backend_tokenizer.post_processor = begin
    return made


def word_pieces() -> PreTrainedTokenizerFast:
    """Words joined by spaces, which transformers cleans up."""
    words = ["<unk>", *"the router it s n t so is no yes a b , . ? ! '".split(), "##er", "##the", "<more>"]
    plain = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.normalizer = normalizers.BertNormalizer()
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<|end|>", clean_up_tokenization_spaces=True
    )


def metaspace_words() -> dict[str, int]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"therout", "th", "\u2581t"]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


MADE: dict[str, Callable[[], Any]] = {
    "demo": lambda: find_base("demo").tokenizer,
    "byte level": lambda: byte_level(eos_token="<|end|>", pad_token="<|end|>"),
    "byte level, no special token": byte_level,
    "a beginning of text": with_beginning,
    "word pieces, cleaned": word_pieces,
    "BPE that asks to be cleaned": lambda: PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, clean_up_tokenization_spaces=True
    ),
    "LlamaTokenizer": lambda: LlamaTokenizer(vocab=metaspace_words(), merges=[("t", "h"), ("\u2581", "t")]),
    "Qwen2Tokenizer": lambda: Qwen2Tokenizer(
        vocab={letter: index for index, letter in enumerate([*LETTERS, "th"])}, merges=[("t", "h")]
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_ids_and_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "model", tmp_path / "onnx"
    folder.mkdir()
    MADE[name]().save_pretrained(source)
    expected = AutoTokenizer.from_pretrained(source)
    write_tokenizer(source, "model", folder)
    found = open_tokenizer(folder)
    assert (found.eos_token_id, found.bos_token_id) == (expected.eos_token_id, expected.bos_token_id)
    for text in TEXTS:
        for special in (True, False):
            ids = expected(text, add_special_tokens=special)["input_ids"]
            assert found.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert found.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
        for end in range(1, len(ids)):  # as generation decodes: also half characters
            part = ids[:end]
            assert found.decode(part, skip_special_tokens=True) == expected.decode(part, skip_special_tokens=True)


def slow_files(folder: Path) -> None:
    """Write the files of a tokenizer as early models have them: a vocabulary, merges and added tokens apart."""
    folder.mkdir()
    files = {
        "vocab.json": {letter: index for index, letter in enumerate(LETTERS)} | {"<|end|>": 256},
        "added_tokens.json": {"<|im_start|>": 257, "<|im_end|>": 258},
        "special_tokens_map.json": dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|end|>"),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_added_tokens_of_another_file_are_exported(tmp_path: Path) -> None:
    slow_files(tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    write_tokenizer(tmp_path / "model", "model", tmp_path / "onnx")
    chat = "<|im_start|>hi<|im_end|>"
    letters = [LETTERS.index(letter) for letter in "hi"]
    readers = (AutoTokenizer.from_pretrained(tmp_path / "onnx"), open_tokenizer(tmp_path / "onnx"))
    assert [reader.encode(chat) for reader in readers] == 2 * [[257, *letters, 258]]


def test_an_export_that_gives_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_files(tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    without = AutoTokenizer.from_pretrained(tmp_path / "model").backend_tokenizer.to_str().replace("im_end", "im_other")
    monkeypatch.setattr(tokenizer_files, "_serialized", lambda *_: without)
    with pytest.raises(InputError, match=r"model: .*<\|im_end\|>.*\[258\]"):
        write_tokenizer(tmp_path / "model", "model", tmp_path / "onnx")


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "merges.txt"]
)
def test_every_file_that_changes_ids_changes_the_identity(model_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    before = find_base(str(folder)).identity()
    text = (folder / name).read_text() if (folder / name).exists() else ""
    (folder / name).write_text(json.dumps(json.loads(text or "{}") | {"<|new|>": 300}))
    assert find_base(str(folder)).identity() != before
    assert find_base(str(folder)).has_identity(find_base(str(folder)).identity())


def test_words_are_cleaned_and_byte_pairs_are_not(tmp_path: Path) -> None:
    cleaned = {}
    for name in ("word pieces, cleaned", "BPE that asks to be cleaned"):
        (tmp_path / name).mkdir()
        MADE[name]().save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, name, tmp_path / name)
        tokenizer = open_tokenizer(tmp_path / name)
        cleaned[name] = tokenizer.decode(tokenizer.encode("so , is it ? no ."))
    assert list(cleaned.values()) == ["so, is it? no.", "so , is it ? no ."]


def test_a_special_token_that_only_its_class_knows_is_written_down(tmp_path: Path) -> None:
    """LlamaTokenizer ends a text by </s> even if its configuration does not say so."""
    MADE["LlamaTokenizer"]().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
    path.write_text(json.dumps(config))
    (tmp_path / "onnx").mkdir()
    write_tokenizer(tmp_path / "model", "model", tmp_path / "onnx")
    assert open_tokenizer(tmp_path / "onnx").eos_token_id == 2


def test_a_model_without_a_tokenizer_gets_none(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    write_tokenizer(tmp_path, "model", tmp_path / "onnx")
    assert list((tmp_path / "onnx").iterdir()) == []
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path / "onnx")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}', "[" * 100_000], ids=["cut", "list", "empty", "deep"])
def test_a_damaged_tokenizer(file: str, content: str, tmp_path: Path) -> None:
    MADE["byte level"]().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    if (file, content) == ("tokenizer_config.json", '{"model": {}}'):
        assert open_tokenizer(tmp_path).eos_token_id is None
        return
    with pytest.raises(InputError, match=str(tmp_path)):
        open_tokenizer(tmp_path)


SENTENCEPIECE = """
import json, sys
from pathlib import Path
from sentencepiece import sentencepiece_model_pb2 as proto
folder = Path(sys.argv[1])
model = proto.ModelProto()
words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
kinds = [2, 3, 3, *[6] * 256]
words += ["\\u2581t", "he", "\\u2581the", "er", "\\u2581ro"]
words += ["ut", "\\u2581rout", "\\u2581router", "\\u2581", *"the rout."]
for index, word in enumerate(dict.fromkeys(words)):
    kind = kinds[index] if index < len(kinds) else 1
    model.pieces.add(piece=word, score=-float(index), type=kind)
model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", True
model.normalizer_spec.remove_extra_whitespaces = False
(folder / "tokenizer.model").write_bytes(model.SerializeToString())
config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
(folder / "config.json").write_text('{"model_type": "llama"}')
from transformers import AutoTokenizer
from irc.deployment import tokenizer_files
from irc.deployment.tokenizer_files import write_tokenizer
(folder / "onnx").mkdir()
write_tokenizer(folder, "model", folder / "onnx")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]
print(json.dumps([ids, [tokenizer.decode(each, skip_special_tokens=True) for each in ids], tokenizer.eos_token_id]))
"""


@pytest.mark.slow
def test_a_sentencepiece_model_is_converted(installed: Callable[..., Path], tmp_path: Path) -> None:
    packages = installed("sentencepiece", ["sentencepiece>=0.2,<1"])
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", SENTENCEPIECE, str(tmp_path), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    ids, texts, end = json.loads(done.stdout.splitlines()[-1])
    tokenizer = open_tokenizer(tmp_path / "onnx")
    assert [tokenizer.encode(text) for text in TEXTS] == ids
    assert [tokenizer.decode(each, skip_special_tokens=True) for each in ids] == texts
    assert tokenizer.eos_token_id == end == 2
    assert len(tokenizer.encode("the router")) < len("the router")
