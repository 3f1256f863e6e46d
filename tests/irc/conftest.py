"""Fixtures: a tiny random Llama with a tokenizer, a text file, and what stages and commands need to run on them."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irc import console
from irc.bundle.saving import save_bundle
from irc.cli import main
from irc.deployment.onnx_folder import export
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe
from irc.recipe.stages import LffRecipe, LoraRecipe, RouterRecipe
from irc.text.source import load_text, token_stream
from irc.training.lora import inject_lora, lora_parameters
from irc.training.stages import StageContext
from tests.irc.forked import Forked

SEQ_LEN = 16
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # ten times the usual one: a tiny model must not be nearly linear
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "bos_token_id": 256,
}
SETTINGS = (
    "lff.tokens=2048 lff.steps=4 lff.batch_size=4 router.steps=6 router.batch_size=4 router.calibration_tokens=4096 "
    "router.teach_steps=2 lora.steps=4 lora.batch_size=4 lora.rank=2 eval_tokens=1024 checkpoint_seconds=0 "
    "precision=fp32 sparsity=0.25"
).split()


class Killed(BaseException):
    """Plays the part of a kill: nothing in the package may catch it."""


@dataclass
class Bar:
    """A progress bar that records its steps, and raises Killed at the step `kill`."""

    name: str
    kill: int | None
    steps: list[int] = field(default_factory=list)

    def update(self, step: int, **figures: float | str) -> None:
        self.steps.append(step)
        if step == self.kill:
            raise Killed


@dataclass
class Bars:
    """A progress factory that records its bars; `kill=(name, step)` raises Killed at that step of that bar."""

    kill: tuple[str, int] = ("", 0)
    made: list[Bar] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Bar]:
        self.made.append(Bar(name, self.kill[1] if name == self.kill[0] else None))
        yield self.made[-1]

    def names(self) -> list[str]:
        return [bar.name for bar in self.made]


@pytest.fixture(scope="session")
def bars() -> type[Bars]:
    return Bars


@pytest.fixture(scope="session")
def killed() -> type[BaseException]:
    return Killed


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, and an end-of-text token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, its tokenizer beside it. Read it, never write to it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **CONFIG)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder of that Llama, densely. Read it, never write to it."""
    folder = tmp_path_factory.mktemp("onnx") / "dense"
    export(str(model_folder), folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 kB of sentences from a few words."""
    words = "the a token router unit layer reads writes skips keeps slowly often every model small deep".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(4, 12))) + "." for _ in range(1300)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def base(model_folder: Path) -> BaseModel:
    return find_base(str(model_folder))


@pytest.fixture
def make_routed(base: BaseModel) -> Callable[..., RoutedForCausalLM]:
    """Give `make_routed(rank, forecaster, policy, sparsity)`: the tiny model, nothing trained, fp32."""

    def make(
        rank: int = 4, forecaster: str = "linear", policy: str = "informed", sparsity: float = 0.0
    ) -> RoutedForCausalLM:
        model = build_routed(base, RoutingSpec(rank, forecaster, policy, sparsity), "fp32")
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Random token ids, int64 [4, SEQ_LEN]."""
    return torch.randint(0, 256, (4, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def streams(base: BaseModel, text_file: Path) -> dict[str, torch.Tensor]:
    text = load_text(str(text_file))
    return {name: token_stream(text.split(name), base.tokenizer) for name in ("train", "calibration", "heldout")}


@pytest.fixture
def make_context(
    make_routed: Callable[..., RoutedForCausalLM], streams: dict[str, torch.Tensor], tmp_path: Path
) -> Callable[..., StageContext]:
    """Give `make_context(progress, sparsity, policy)`: what a stage needs; checkpoints after every step in tmp_path."""

    def make(progress: ProgressFactory | None = None, sparsity: float = 0.25, policy: str = "informed") -> StageContext:
        recipe = Recipe(
            policy=policy,
            sparsity=sparsity,
            rank=4,
            seq_len=SEQ_LEN,
            device="cpu",
            precision="fp32",
            checkpoint_seconds=0.0,
            lff=LffRecipe(tokens=2048, steps=4, batch_size=4),
            router=RouterRecipe(steps=6, batch_size=4, calibration_tokens=8192),
            lora=LoraRecipe(steps=4, batch_size=4, rank=2),
        )
        return StageContext(
            make_routed(policy=policy, sparsity=sparsity),
            recipe,
            streams["train"],
            streams["calibration"],
            tmp_path,
            progress or Bars(),
        )

    return make


@pytest.fixture(scope="session")
def shake() -> Callable[[RoutedForCausalLM], RoutedForCausalLM]:
    """Give `shake(model)`: its routers disagree between tokens, so that about half of the pairs are skipped."""

    def change(model: RoutedForCausalLM) -> RoutedForCausalLM:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.adapter_parameters("router", "forecaster").values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    return change


@pytest.fixture(scope="session")
def lora_on() -> Callable[[RoutedForCausalLM], RoutedForCausalLM]:
    """Give `lora_on(model)`: LoRA adapters with weights that matter."""

    def change(model: RoutedForCausalLM) -> RoutedForCausalLM:
        inject_lora(model, LoraRecipe(rank=2), 0)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.eval()

    return change


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def sentence(self) -> str:
        """Return the error: exactly one line `error: ...` ends stderr, and there is no traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err, self.err
        assert len(errors) == 1, self.err
        assert self.err.rstrip().endswith(errors[0]), self.err
        return errors[0].removeprefix("error: ")


@pytest.fixture
def irc_main(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Give `irc_main(*arguments)`: the command line inside this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Outcome(code, shown.out, shown.err)

    with warnings.catch_warnings():
        yield call
    console.set_json_mode(False)
    for name in ("irc", "exporters", "passes"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)


@pytest.fixture
def convert_arguments(model_folder: Path, text_file: Path) -> Callable[..., list[str]]:
    """Give `convert_arguments(output, **settings)`: a conversion of a second or two."""

    def make(output: Path, **settings: object) -> list[str]:
        chosen = [*SETTINGS, *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
        flags = [flag for setting in chosen for flag in ("--set", setting)]
        return [
            *("convert", str(model_folder), "-o", str(output), "--data", str(text_file), "--rank", "4"),
            *("--seq-len", str(SEQ_LEN), "--device", "cpu", "--json", *flags),
        ]

    return make


@pytest.fixture
def start_irc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Sequence[str]], Forked]]:
    """Give `start_irc(arguments)`: the command line in a process of its own, which ends with the test."""
    started = []

    def start(arguments: Sequence[str]) -> Forked:
        started.append(Forked(main, arguments, folder=tmp_path_factory.mktemp("said")))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def bundle(base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(model, folder, {"calibration_keep": {unit.name: 0.4 for unit in model.units}})
    return folder


@pytest.fixture(scope="session")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "routed"
    export(str(bundle), folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Give `installed(name, packages, dependencies)`: a folder for PYTHONPATH, or the test is skipped."""

    def install(name: str, packages: list[str], dependencies: tuple[str, ...] = ()) -> Path:
        folder = Path(request.config.cache.mkdir(f"runtime-{name}-{sys.version_info.minor}"))
        wanted = json.dumps([packages, dependencies])
        stamp = folder / "installed"
        if stamp.is_file() and stamp.read_text() == wanted:
            return folder
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", "--target", str(folder)]
        commands = [[*pip, "--no-deps", *packages], *([[*pip, *dependencies]] if dependencies else [])]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{name} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(wanted)
        return folder

    return install
