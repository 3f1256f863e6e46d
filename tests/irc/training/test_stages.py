"""The closed form on a model, the order of work in the stages, and the threshold that meets the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from irc.errors import InputError, IrcError
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.text.source import windows
from irc.training import calibrate as calibration
from irc.training.budget import plain_budget
from irc.training.calibrate import calibrate
from irc.training.stages import (
    StageContext,
    check_text,
    cosine_schedule,
    fit_closed_form,
    run_lff,
    run_router,
)


def calibrated(context: StageContext) -> dict[str, Any]:
    units = [unit.name for unit in context.model.units]
    return calibrate(
        context.model, context.calibration_windows(), plain_budget(units, context.recipe.sparsity), context.progress
    )


TARGETS = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]


def tape_of(model: RoutedForCausalLM, text: torch.Tensor, **control: Any) -> dict[str, Record]:
    tape: dict[str, Record] = {}
    with torch.no_grad(), model.control.using(tape=tape, **control):
        model(input_ids=text, use_cache=False)
    return tape


def share_skipped(model: RoutedForCausalLM, text: torch.Tensor) -> float:
    """Count approximated pairs under argmax routing, one by one."""
    records = tape_of(model, text, mode="route").values()
    return sum(int((~record.execute).sum()) for record in records) / sum(record.execute.numel() for record in records)


@pytest.mark.parametrize("target", TARGETS)
def test_threshold_reaches_the_target(make_context: Callable[..., StageContext], shake: Any, target: float) -> None:
    context = make_context(sparsity=target)
    shake(context.model)
    figures = calibrated(context)
    text = windows(context.calibration_stream, context.recipe.seq_len)
    count = min(len(text), context.recipe.router.calibration_tokens // context.recipe.seq_len)
    chosen = text[torch.linspace(0, len(text) - 1, count).long()]
    realized = share_skipped(context.model, chosen)
    assert abs(realized - target) <= 0.01
    assert figures["calibration_sparsity"] == pytest.approx(realized, abs=1e-9)  # reports what was measured


@pytest.mark.parametrize("gain", [0.0, 1.5, 3.0])
def test_the_threshold_converges_when_routes_answer_a_shift_too_strongly(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """Every logit difference falls further, by `gain` times the shift, as if skipping led to more skipping."""
    context = make_context(sparsity=0.3)
    units = [unit.name for unit in context.model.units]
    draws = {unit: torch.randn(2000, generator=torch.Generator().manual_seed(i)) for i, unit in enumerate(units)}
    biases = calibration._biases(context.model)
    start = {unit: bias.clone() for unit, bias in biases.items()}

    def differences(_: RoutedForCausalLM, __: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            unit: draws[unit] + (1 + gain) * (biases[unit] - start[unit])[calibration.EXECUTE].item() for unit in units
        }

    monkeypatch.setattr(calibration, "_differences", differences)
    figures = calibrated(context)
    assert figures["calibration_sparsity"] == pytest.approx(0.3, abs=0.002)


def test_the_first_rounds_read_a_part_of_the_text(
    make_context: Callable[..., StageContext], shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(sparsity=0.4)
    shake(context.model)
    monkeypatch.setattr(calibration, "_FEW", 1024)
    read: list[int] = []
    states = context.model.states
    monkeypatch.setattr(context.model, "states", lambda batch: (read.append(batch.numel()), states(batch))[1])
    figures = calibrated(context)
    text = context.calibration_windows()
    few, whole = text[:: text.numel() // 1024].numel(), text.numel()
    rounds = figures["calibration_rounds"]
    assert sum(read) in [part * few + (rounds - part) * whole for part in (1, 2, 3)]
    assert abs(figures["calibration_sparsity"] - 0.4) <= 0.01


@pytest.mark.parametrize("target", [0.25, 0.9])
def test_threshold_holds_on_held_out_text(
    make_context: Callable[..., StageContext], streams: dict[str, torch.Tensor], shake: Any, target: float
) -> None:
    context = make_context(sparsity=target)
    shake(context.model)
    calibrated(context)
    heldout = windows(streams["heldout"], context.recipe.seq_len)[:512]
    assert abs(share_skipped(context.model, heldout) - target) <= 0.02  # about 5,000 tokens of the same source


def test_threshold_only_moves_the_execute_biases(make_context: Callable[..., StageContext], shake: Any) -> None:
    context = make_context(sparsity=0.1)
    shake(context.model)
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    shift = calibrated(context)["threshold_shift"]
    assert shift != 0
    shifts: list[float] = []
    for name, tensor in context.model.state_dict().items():
        if name.endswith("_router.2.bias"):
            shifts.append(tensor[0].item() - before[name][0].item())
            assert tensor[1] == before[name][1]
        else:
            assert torch.equal(tensor, before[name]), name
    assert sum(shifts) / len(shifts) == pytest.approx(shift, abs=1e-5)


def test_argmax_after_folding_is_thresholding_before(
    make_context: Callable[..., StageContext], shake: Any, ids: torch.Tensor
) -> None:
    """Folding the threshold into the bias routes as a threshold on the old logits does, on the same states."""
    context = make_context()
    model = shake(context.model)
    text = ids[:, :1]
    threshold = 0.37
    first = model.units[0]
    before = tape_of(model, text, mode="route")[first.name].difference
    logits = tape_of(model, ids, mode="execute")
    for unit in model.units:
        model.part(unit, "router").shift(-threshold)
    after = tape_of(model, text, mode="route")[first.name]
    assert before is not None
    assert torch.equal(after.execute, before >= threshold)
    for name, record in tape_of(model, ids, mode="execute").items():
        old = logits[name].difference
        assert old is not None
        clear = (old - threshold).abs() > 1e-6  # one rounding of the bias in fp32
        assert torch.equal((record.difference >= 0)[clear], (old >= threshold)[clear])  # type: ignore[operator]
        assert int(clear.sum()) > 0.9 * clear.numel()


def test_lff_without_refinement_is_the_closed_form(make_context: Callable[..., StageContext]) -> None:
    one, other = make_context(), make_context()
    one.recipe.lff.steps = 0
    figures = run_lff(one)
    fit_closed_form(other, other.train_windows())
    assert "refine_seconds" not in figures
    for name, parameter in one.model.adapter_parameters("forecaster").items():
        assert torch.equal(parameter, other.model.adapter_parameters("forecaster")[name]), name


def test_lff_raises_the_held_out_cosine(
    make_context: Callable[..., StageContext], streams: dict[str, torch.Tensor]
) -> None:
    context = make_context()
    heldout = windows(streams["heldout"], context.recipe.seq_len)[:64]

    def cosine() -> float:
        records = tape_of(context.model, heldout, mode="execute", measure_error=True).values()
        return float(torch.stack([record.cosine.mean() for record in records]).mean())  # type: ignore[union-attr]

    untrained = cosine()
    context.recipe.lff.steps = 0
    run_lff(context)
    closed = cosine()
    assert untrained < 0.2
    assert closed > untrained + 0.2
    context.recipe.lff.steps = 60
    run_lff(context)
    assert cosine() > closed


def test_router_stage_leaves_the_base_alone(make_context: Callable[..., StageContext]) -> None:
    context = make_context()
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    run_router(context)
    for name, tensor in context.model.state_dict().items():
        inserted = "_router." in name or "_forecaster." in name
        assert torch.equal(tensor, before[name]) != inserted, name


def test_router_stage_with_frozen_forecasters(make_context: Callable[..., StageContext]) -> None:
    context = make_context()
    context.recipe.router.forecaster_lr = 0.0
    before = {name: p.detach().clone() for name, p in context.model.adapter_parameters("forecaster").items()}
    run_router(context)
    for name, parameter in context.model.adapter_parameters("forecaster").items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("split", "lengths", "field"),
    [
        ("train", {"seq_len": 16}, "seq_len"),
        ("calibration", {"seq_len": 16}, "seq_len"),
        ("train", {"seq_len": 8, "train_seq_len": 16}, "train_seq_len"),
        ("calibration", {"seq_len": 16, "train_seq_len": 8}, "seq_len"),
    ],
)
def test_short_text_is_refused(
    streams: dict[str, torch.Tensor], split: str, lengths: dict[str, int], field: str
) -> None:
    short = {split: torch.zeros(15, dtype=torch.int64)}
    with pytest.raises(InputError, match=f"{split} split .* 15 tokens.* 16; .* smaller {field}$"):
        check_text(Recipe(**lengths), streams | short)


def test_cosine_schedule() -> None:
    schedule = cosine_schedule(0.1)
    assert [schedule(progress) for progress in (0, 0.5, 1, 2)] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_routers_that_are_not_finite_are_refused(make_context: Callable[..., StageContext], shake: Any) -> None:
    context = make_context()
    shake(context.model)
    with torch.no_grad():
        context.model.part(context.model.units[1], "router").last.bias.fill_(torch.nan)
    with pytest.raises(IrcError, match=r"router\.lr"):
        calibrated(context)


def test_a_target_that_is_missed_is_logged(
    make_context: Callable[..., StageContext], caplog: pytest.LogCaptureFixture
) -> None:
    context = make_context(sparsity=0.4)
    with torch.no_grad():
        for unit in context.model.units:
            context.model.part(unit, "router").last.weight.zero_()  # all tokens get the same logits
    assert calibrated(context)["calibration_sparsity"] == 0.5  # two units of four
    assert "0.500" in caplog.text
    assert "0.400" in caplog.text
