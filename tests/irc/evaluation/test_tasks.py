"""`irc eval --tasks`: lm-evaluation-harness on bundles and ONNX folders, and the tasks made from Python text."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irc.bundle.saving import save_bundle
from irc.errors import InputError
from irc.evaluation.tasks.local import LOCAL, RECALL_DISTANCE, write_tasks
from irc.evaluation.tasks.scorers import TorchScorer, cut_at_stop
from irc.model.routed import RoutedForCausalLM
from irc.text.source import Document

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra tasks)")
from lm_eval.api.instance import Instance

from irc.evaluation.tasks.harness import HarnessModel

Make = Callable[..., RoutedForCausalLM]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "ast.py", "inspect.py", "json/decoder.py")
    return [Document(name, (root / name).read_text()) for name in names]


def count(text: str) -> int:
    """Count tokens as if each had three characters."""
    return len(text) // 3


@pytest.fixture
def questions(documents: list[Document], tmp_path: Path) -> dict[str, list[Any]]:
    """All local tasks, 40 questions each."""
    write_tasks(LOCAL, documents, count, tmp_path, 40)
    return {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in LOCAL
    }


@pytest.fixture
def harness(make_routed: Make, shake: Any, bars: Any) -> Callable[[str], HarnessModel]:
    def make(mode: str = "route") -> HarnessModel:
        return HarnessModel(TorchScorer(shake(make_routed()), mode), bars(), "routed")  # type: ignore[arg-type]

    return make


def test_every_question_has_four_different_answers_and_one_is_true(questions: dict[str, list[Any]]) -> None:
    for name, found in questions.items():
        assert len(found) == 40, name
        for question in found:
            assert len(set(question["choices"])) == 4
            assert 0 <= question["answer"] < 4
            assert question["context"].strip()
        assert len({question["answer"] for question in found}) == 4  # the right answer is at any of the four places


def test_true_answers_are_what_the_source_says(questions: dict[str, list[Any]], documents: list[Document]) -> None:
    everything = "\0".join(document.text for document in documents)
    for found in questions.values():
        for question in found:
            assert question["context"] + question["choices"][question["answer"]] in everything


def test_recalled_names_were_last_seen_far_back(questions: dict[str, list[Any]]) -> None:
    for question in questions["code_recall"]:
        name = question["choices"][question["answer"]]
        assert question["context"].startswith(name)
        assert question["context"].count(name) >= 1
        assert count(question["context"]) >= RECALL_DISTANCE
        assert all(other in question["context"] for other in question["choices"])


def test_the_same_seed_asks_the_same(documents: list[Document], tmp_path: Path, questions: Any) -> None:
    (tmp_path / "again").mkdir()
    write_tasks(LOCAL, documents, count, tmp_path / "again", 40)
    for name in LOCAL:
        assert (tmp_path / f"{name}.jsonl").read_text() == (tmp_path / "again" / f"{name}.jsonl").read_text()


def test_text_without_functions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="code_continuation"):
        write_tasks(LOCAL, [Document("a.txt", "no code here\n" * 50)], count, tmp_path, 10)


def test_likelihoods_are_those_of_each_request_alone(harness: Callable[..., HarnessModel]) -> None:
    """Padding of batches changes neither the figures nor the skipped shares."""
    draw = random.Random(1)
    requests: list[Any] = []
    for size in (3, 17, 9, 30, 5, 62, 90):
        text = [draw.randrange(256) for _ in range(size)]
        answer = max(1, size // 4)
        requests.append((None, text[:-answer], text[-answer:]))
    together, alone = harness(), harness()
    found = together._loglikelihood_tokens(requests)
    for (value, greedy), request in zip(found, requests, strict=True):
        single, choice = alone._loglikelihood_tokens([request])[0]
        assert value == pytest.approx(single, rel=1e-4)
        assert greedy == choice
    assert (together.scorer.executed, together.scorer.pairs) == (alone.scorer.executed, alone.scorer.pairs)
    real = sum(min(len(context) + len(answer) - 1, 64) for _, context, answer in requests)
    assert alone.scorer.pairs == 4 * real


def test_a_likelihood_is_the_sum_over_the_answer(harness: Callable[..., HarnessModel]) -> None:
    model = harness()
    context, answer = list(b"the router "), list(b"reads")
    (value, _), *_ = model._loglikelihood_tokens([(None, context, answer)])
    ids = torch.tensor([context + answer])
    chances = model.scorer.logits(ids, torch.ones_like(ids))[0].log_softmax(-1)
    expected = sum(chances[len(context) - 1 + i, token].item() for i, token in enumerate(answer))
    assert value == pytest.approx(expected, rel=1e-5)


def test_an_answer_that_shares_its_only_token_with_the_context_is_scored_alone(
    harness: Callable[..., HarnessModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vocabularies have them in which one token is `ab`, and the context ends in a."""
    model = harness()
    words = {"ab": [98], "a": [97], "b": [66]}
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, **options: words[text])
    (found,) = model.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])
    (expected,) = model._loglikelihood_tokens([(None, [97], [66])])
    assert found == expected


@pytest.mark.parametrize("stop", [["<|end|>"], ["x" * 9, "<|end|>"]])
def test_a_special_token_that_is_a_stop_string_ends_an_answer(
    harness: Callable[..., HarnessModel], monkeypatch: pytest.MonkeyPatch, stop: list[str]
) -> None:
    scorer = harness().scorer
    monkeypatch.setattr(scorer.model, "generate", lambda ids, **options: torch.tensor([[97, 104, 105, 256, 106]]))
    assert scorer.continue_text("a", stop, 4) == scorer.tokenizer.decode([104, 105])


def test_rolling_likelihood_covers_every_token_once(harness: Callable[..., HarnessModel]) -> None:
    class Request:
        args = ("the router reads slowly " * 8,)  # 192 tokens, three windows of 64

    model = harness("execute")
    (value,) = model.loglikelihood_rolling([Request()])
    per_token = value / len(Request.args[0])
    assert -12 < per_token < -2
    assert model.scorer.pairs >= 4 * 190


def test_texts_end_at_the_first_stop_string() -> None:
    assert cut_at_stop("abcdef", ["e", "c"]) == "ab"
    assert cut_at_stop("abcdef", ["x", ""]) == "abcdef"


@pytest.mark.slow
def test_bundle_and_onnx_folder_answer_alike(
    irc_main: Any, make_routed: Make, shake: Any, tmp_path: Path, text_file: Path
) -> None:
    source = tmp_path / "text.py"
    source.write_text((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text())
    save_bundle(shake(make_routed()), tmp_path / "b")
    assert irc_main("export", tmp_path / "b", "-o", tmp_path / "onnx").code == 0
    # The tiny model reads 64 bytes, too few for names 200 tokens back, so code_recall is left out.
    arguments = ("--tasks", "code_closing", "--limit", "12", "--data", source, "--json")
    torch_side, onnx_side = (irc_main("eval", tmp_path / name, *arguments) for name in ("b", "onnx"))
    assert torch_side.code == onnx_side.code == 0, torch_side.err + onnx_side.err
    ours, theirs = torch_side.json, onnx_side.json
    assert (ours["backend"], theirs["backend"]) == ("pytorch", "onnxruntime")
    assert ours["tasks"]["code_closing"]["routed"] == pytest.approx(theirs["tasks"]["code_closing"]["routed"])
    assert set(ours["tasks"]["code_closing"]) == {"dense", "routed"}
    assert ours["tasks"]["code_closing"]["dense"]["questions"] == 12
    assert ours["sparsity"]["realized"] == pytest.approx(theirs["sparsity"]["realized"], abs=1e-6)


@pytest.mark.slow
def test_tasks_of_the_user_s_own(irc_main: Any, model_folder: Path, tmp_path: Path) -> None:
    """Task files in the harness's own format: generation until a stop string, and rolling likelihood."""
    (tmp_path / "data.jsonl").write_text('{"text": "the router reads", "answer": "x"}\n' * 3)
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\ntest_split: test\n"
    )
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\n{common}output_type: generate_until\ndoc_to_text: text\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    outcome = irc_main("eval", model_folder, "--tasks", "mine,rolling", "--task-path", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["tasks"]["mine"]["dense"]["exact_match"] == 0.0
    assert outcome.json["tasks"]["rolling"]["dense"]["byte_perplexity"] > 1
    assert outcome.json["sparsity"]["realized"] is None


def test_unknown_tasks_are_refused(irc_main: Any, model_folder: Path) -> None:
    outcome = irc_main("eval", model_folder, "--tasks", "code_closing,no_such_task")
    assert outcome.code == 2
    assert "'no_such_task'" in outcome.sentence()
    outcome = irc_main("eval", model_folder, "--tasks", "code_closing", "--task-path", "/nowhere")
    assert (outcome.code, "/nowhere" in outcome.sentence()) == (2, True)
