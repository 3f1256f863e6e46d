"""The training loop: bit-exact resuming, damaged checkpoints, losses that are not finite, noise over processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from safetensors import safe_open
from torch import nn

from irc.errors import InputError, IrcError
from irc.files.tensors import write_safetensors
from irc.training.loop import LoopResult, LoopSettings, Objective, accelerator_for, step_noise, train
from irc.training.stages import StageContext, run_lff, run_lora, run_router

STEPS = 8
RUNNERS = {"lff": run_lff, "router": run_router, "lora": run_lora}


class Dropping(Objective):
    """A linear with dropout, so that a step gives the same result only with the same random numbers."""

    def __init__(self, poison: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 16).view(4, 4))
            self.linear.bias.zero_()
        self.drop = nn.Dropout(0.3)
        self.poison = poison
        self.seen: list[list[int]] = []
        self.total = 0.0

    def trainable(self) -> list[dict[str, Any]]:
        return [{"params": dict(self.linear.named_parameters()), "lr": 0.1}]

    def state(self) -> dict[str, float]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, float]) -> None:
        self.total = state.get("total", 0.0)

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.total += float(windows.sum())
        self.seen.append(windows[:, 0].tolist())
        x = (windows[:, :4] / 50).to(self.linear.weight.dtype)
        loss = (self.drop(self.linear(x)) - x.flip(-1)).square().mean()
        return loss * (float("nan") if step == self.poison else 1.0), {"at": float(step)}


class Stop:
    """Raises after a step."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.steps: list[int] = []

    def update(self, step: int, **figures: float | str) -> None:
        self.steps.append(step)
        if step == self.after:
            raise KeyboardInterrupt


def run(objective: Objective, folder: Path, after: int | None = None, seed: int = 0) -> tuple[LoopResult | None, Stop]:
    settings = LoopSettings(
        steps=STEPS,
        batch_size=2,
        schedule=lambda progress: 1 - progress,
        seed=seed,
        checkpoint=folder / "stage.safetensors",
        checkpoint_seconds=0.0,
        weight_decay=0.01,
    )
    windows = torch.arange(40).view(10, 4)
    progress = Stop(after)
    try:
        return train(objective, windows, settings, progress, accelerator_for("cpu", "fp32")), progress
    except KeyboardInterrupt:
        return None, progress


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", range(1, STEPS + 1))
def test_a_killed_loop_continues_to_the_same_bits(tmp_path: Path, after: int, dtype: torch.dtype) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Dropping(dtype=dtype)
    expected, _ = run(whole, tmp_path / "a")
    assert expected is not None
    first = Dropping(dtype=dtype)
    assert run(first, tmp_path / "b", after)[0] is None
    second = Dropping(dtype=dtype)
    found, progress = run(second, tmp_path / "b")
    assert found is not None
    assert progress.steps == list(range(after, STEPS + 1))  # the killed step's checkpoint was not yet written
    assert first.seen[: after - 1] + second.seen == whole.seen
    assert torch.equal(second.linear.weight, whole.linear.weight)
    assert second.total == whole.total
    assert torch.equal(second.linear.bias, whole.linear.bias)
    assert found.figures == expected.figures
    assert found.tokens == expected.tokens == STEPS * 2 * 4
    assert found.seconds > 0
    assert [step for step, _ in found.history] == list(range(1, STEPS + 1))
    assert found.history == expected.history


def test_a_loop_whose_last_step_is_in_the_checkpoint_does_nothing_more(tmp_path: Path) -> None:
    whole = Dropping()
    expected, _ = run(whole, tmp_path)
    again = Dropping()
    found, progress = run(again, tmp_path)
    assert progress.steps == []
    assert torch.equal(again.linear.weight, whole.linear.weight)
    assert found is not None
    assert expected is not None
    assert found.figures == expected.figures


def test_seed_and_step_decide_data_and_dropout(tmp_path: Path) -> None:
    one, other = Dropping(), Dropping()
    (tmp_path / "other").mkdir()
    run(one, tmp_path)
    run(other, tmp_path / "other", seed=1)
    assert one.seen != other.seen
    assert not torch.equal(one.linear.weight, other.linear.weight)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "junk":
        path.write_bytes(b"\x00" * 100)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no facts":
        write_safetensors(path, {"weight/0.weight": torch.zeros(4, 4)}, {"format": "pt"})
    else:
        facts = {"step": 1, "seconds": 1.0, "figures": {}, "history": []}
        shape = (3, 3) if how == "other shape" else (4, 4)
        name = "0.other" if how == "other names" else "0.weight"
        write_safetensors(path, {f"weight/{name}": torch.zeros(shape)}, {"irc": json.dumps(facts)})


@pytest.mark.parametrize("how", ["truncated", "junk", "empty", "no facts", "other names", "other shape"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    run(Dropping(), tmp_path, after=3)
    damage(tmp_path / "stage.safetensors", how)
    with pytest.raises(InputError, match=r"stage\.safetensors"):
        run(Dropping(), tmp_path)


@pytest.mark.parametrize("step", [0, 3])
def test_a_loss_that_is_not_finite_is_refused_and_not_learned(tmp_path: Path, step: int) -> None:
    objective = Dropping(poison=step)
    with pytest.raises(IrcError, match=f"nan at step {step}"):
        run(objective, tmp_path)
    assert bool(torch.isfinite(objective.linear.weight).all())


def test_checkpoints_are_safetensors_and_leave_no_temporary_file(tmp_path: Path) -> None:
    run(Dropping(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stage.safetensors"]
    with safe_open(tmp_path / "stage.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["irc"])["step"] == STEPS


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("irc.files.tensors.save_file", full)
    with pytest.raises(IrcError, match=r"x\.safetensors: .*No space left"):
        write_safetensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As object stores and file shares are mounted."""

    def chmod(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", chmod)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("a"), torch.ones(2))


@pytest.mark.parametrize("processes", [2, 4])
def test_noise_is_one_draw_cut_over_processes(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    accelerator_for("cpu", "fp32")
    units = ["a", "b"]
    whole = step_noise(units, 5, 17, (8, 3))
    rows = 8 // processes
    for index in range(processes):
        with monkeypatch.context() as patch:
            patch.setattr(PartialState, "num_processes", processes, raising=False)
            patch.setattr(PartialState, "process_index", index, raising=False)
            patch.setitem(PartialState._shared_state, "num_processes", processes)
            patch.setitem(PartialState._shared_state, "process_index", index)
            part = step_noise(units, 5, 17, (rows, 3))
        for unit in units:
            assert torch.equal(part[unit], whole[unit][index * rows : (index + 1) * rows])
    assert not torch.equal(whole["a"], whole["b"])
    assert not torch.equal(step_noise(units, 5, 18, (8, 3))["a"], whole["a"])
    assert not torch.equal(step_noise(units, 6, 17, (8, 3))["a"], whole["a"])


def stage_result(context: StageContext) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in context.model.state_dict().items()}


@pytest.mark.parametrize(
    ("stage", "bar", "step"),
    [
        ("lff", "lff statistics", 16),
        ("lff", "lff", 1),
        ("lff", "lff", 3),
        ("router", "router", 1),
        ("router", "router", 4),
        ("router", "threshold", 1),
        ("router", "taught", 4),
        ("lora", "lora", 3),
    ],
)
def test_a_killed_stage_continues_to_the_same_bits(
    make_context: Callable[..., StageContext],
    shake: Any,
    bars: Callable[..., Any],
    killed: type[BaseException],
    tmp_path: Path,
    stage: str,
    bar: str,
    step: int,
) -> None:
    def context(kill: tuple[str, int] | None, folder: str) -> StageContext:
        made = make_context(bars(*([kill] if kill else [])))
        made.work = tmp_path / folder
        made.work.mkdir(exist_ok=True)
        shake(made.model)
        if bar == "taught":
            made.recipe.router.teach_steps = 2
        return made

    whole = context(None, "whole")
    expected = RUNNERS[stage](whole)
    with pytest.raises(killed):
        RUNNERS[stage](context((stage if bar == "taught" else bar, step), "killed"))
    resumed = context(None, "killed")
    found = RUNNERS[stage](resumed)
    wanted, state = stage_result(whole), stage_result(resumed)
    assert wanted.keys() == state.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    untimed = {key for key in expected if "seconds" not in key}
    assert {key: found[key] for key in untimed} == {key: expected[key] for key in untimed}
    assert any(
        not torch.equal(tensor, stage_result(context(None, "new")).get(name, tensor.new_zeros(0)))
        for name, tensor in wanted.items()
    )
