from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from passes.base import Pass, PassError, PassManager, PassResult, finish, graph_of


class AddRelu(Pass):
    """Wraps the result in one more relu."""

    def call(self, model: fx.GraphModule) -> PassResult:
        output = next(node for node in model.graph.nodes if node.op == "output")
        with model.graph.inserting_before(output):
            relu = model.graph.call_function(torch.relu, (output.args[0],))
        output.args = (relu,)
        finish(model)
        return PassResult(model, True)


class DoNothing(Pass):
    def call(self, model: fx.GraphModule) -> PassResult:
        return PassResult(model, False)


class NeedTheMoon(DoNothing):
    def requires(self, model: fx.GraphModule) -> None:
        raise PassError("model.layers.0", "expected a moon", "add a moon")

    def call(self, model: fx.GraphModule) -> PassResult:
        raise AssertionError("must not run")


class ReplaceModel(Pass):
    """Returns a new model and checks a promise about it."""

    def __init__(self, result: fx.GraphModule) -> None:
        self.result = result
        self.given: list[fx.GraphModule] = []
        self.checked: list[fx.GraphModule] = []

    def requires(self, model: fx.GraphModule) -> None:
        self.given.append(model)

    def call(self, model: fx.GraphModule) -> PassResult:
        return PassResult(self.result, True)

    def ensures(self, model: fx.GraphModule) -> None:
        self.checked.append(model)


class BreakPromise(DoNothing):
    def ensures(self, model: fx.GraphModule) -> None:
        raise PassError("(root)", "promised more", "report it")


class DropModule(Pass):
    """Breaks the graph: removes its linear but not the call."""

    def call(self, model: fx.GraphModule) -> PassResult:
        delattr(model, "0")
        return PassResult(model, True)


class UseBeforeDefinition(Pass):
    """Breaks the graph: the first operator moves to the end."""

    def call(self, model: fx.GraphModule) -> PassResult:
        nodes = list(model.graph.nodes)
        nodes[2].append(nodes[1])
        return PassResult(model, True)


@pytest.fixture
def model() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_runs_in_order_and_keeps_history(model: fx.GraphModule) -> None:
    manager = PassManager([DoNothing(), AddRelu()])
    result = manager.run(model)
    assert result.modified
    assert manager.history == ["DoNothing", "AddRelu"]
    assert [node.target for node in result.model.graph.nodes if node.op == "call_function"] == [torch.relu]


def test_nothing_modified(model: fx.GraphModule) -> None:
    assert not PassManager([DoNothing(), DoNothing()]).run(model).modified
    assert not PassManager([]).run(model).modified


def test_modified_survives_a_later_pass_that_changes_nothing(model: fx.GraphModule) -> None:
    assert PassManager([AddRelu(), DoNothing()]).run(model).modified


def test_failure_names_pass_place_remedy_and_history(model: fx.GraphModule) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([DoNothing(), AddRelu(), NeedTheMoon()]).run(model)
    assert caught.value.where == "model.layers.0"
    assert "NeedTheMoon" in caught.value.expected
    assert "expected a moon" in caught.value.expected
    assert "add a moon" in caught.value.remedy
    assert "DoNothing, AddRelu" in caught.value.remedy


def test_failure_of_the_first_pass_says_that_none_ran(model: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"\(ran before: none\)"):
        PassManager([NeedTheMoon()]).run(model)


def test_requires_sees_the_input_ensures_and_later_passes_the_result(model: fx.GraphModule) -> None:
    other = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    step = ReplaceModel(other)
    result = PassManager([step, DoNothing()]).run(model)
    assert step.given == [model]
    assert step.checked == [other]
    assert result.model is other


def test_broken_promise_is_a_failure_of_that_pass(model: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"BreakPromise .*promised more"):
        PassManager([BreakPromise()]).run(model)


@pytest.mark.parametrize(
    ("culprit", "message"),
    [(DropModule, "nonexistent attribute 0"), (UseBeforeDefinition, "used before")],
)
def test_verifier_catches_a_pass_that_breaks_the_graph(
    model: fx.GraphModule, culprit: type[Pass], message: str
) -> None:
    manager = PassManager([DoNothing(), culprit(), AddRelu()])
    with pytest.raises(PassError) as caught:
        manager.run(model)
    sentence = str(caught.value)
    assert culprit.__name__ in sentence
    assert message in sentence
    assert "DoNothing" in caught.value.remedy
    assert manager.history == ["DoNothing"]


def test_dumps_before_after_and_diff(model: fx.GraphModule, tmp_path: Path) -> None:
    PassManager([DoNothing(), AddRelu()], dump_dir=tmp_path / "dumps").run(model)
    dumps = tmp_path / "dumps"
    assert sorted(path.name for path in dumps.iterdir()) == [
        f"{stem}.{kind}" for stem in ("00-DoNothing", "01-AddRelu") for kind in ("after.txt", "before.txt", "diff")
    ]
    assert (dumps / "00-DoNothing.diff").read_text() == ""
    assert (dumps / "00-DoNothing.after.txt").read_text() == (dumps / "01-AddRelu.before.txt").read_text()
    assert (dumps / "01-AddRelu.diff").read_text().splitlines()[-3:] == ["-return %2", "+%3 = relu(%2)", "+return %3"]


def test_no_dumps_unless_asked_for(model: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PassManager([AddRelu()]).run(model)
    assert list(tmp_path.iterdir()) == []


def test_finish_makes_the_new_graph_run(model: fx.GraphModule) -> None:
    x = torch.randn(3, 4)
    output = next(node for node in model.graph.nodes if node.op == "output")
    output.args = (output.args[0].args[0],)  # skip the relu
    finish(model)
    torch.testing.assert_close(model(x), model.get_submodule("0")(x), rtol=0, atol=0)


def test_graph_of_tells_captured_from_leaf(model: fx.GraphModule) -> None:
    assert graph_of(model) is model.graph
    assert graph_of(nn.Linear(1, 1)) is None


def test_dumps_go_to_a_folder_that_is_made_with_those_above_it(model: fx.GraphModule, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        PassManager([DoNothing()], dump_dir=folder).run(model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-DoNothing.after.txt",
        "00-DoNothing.before.txt",
        "00-DoNothing.diff",
    ]
    assert (folder / "00-DoNothing.diff").read_text() == ""
