"""A bundle that was converted for a FLOPs ratio: its figures, its files, and its dial on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import irc
from irc.bundle.contents import bundle_of
from irc.errors import InputError
from irc.recipe.target import Target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flops") / "b"


@pytest.fixture
def converted(bundle: Path, irc_main: Any, convert_arguments: Callable[..., list[str]]) -> Path:
    if not bundle.exists():
        arguments = convert_arguments(bundle, router__calibration_tokens=8192)
        outcome = irc_main(*arguments, "--flops", "0.8", "--dial", "0.9,0.6")
        assert outcome.code == 0, outcome.err
    return bundle


def test_the_target_is_met_and_stored(converted: Path) -> None:
    metrics = json.loads((converted / "metrics.json").read_text())
    assert metrics["target"] == {"flops": 0.8}
    assert metrics["sparsity"]["target"] is None
    assert metrics["flops_ratio"] == pytest.approx(0.8, abs=0.03)  # a thousand tokens of other text
    assert metrics["stages"]["router"]["calibration_flops"] == pytest.approx(0.8, abs=0.01)
    config = json.loads((converted / "irc_config.json").read_text())
    assert config["target"] == {"flops": 0.8}
    assert [point["flops"] for point in config["dial"]] == [0.6, 0.8, 0.9]
    assert set(config["dial"][1]["shift"].values()) == {0.0}
    assert config["dial"][1]["realized"] == metrics["stages"]["router"]["calibration_flops"]
    recipe = yaml.safe_load((converted / "recipe.yaml").read_text())
    assert recipe["flops"] == 0.8
    assert "sparsity" not in recipe
    found = bundle_of(irc.load(converted))
    assert found is not None
    assert found.config.measured.target == Target("flops", 0.8)
    assert found.recipe.target == Target("flops", 0.8)


def test_the_dial_is_turned_by_flops(converted: Path, irc_main: Any) -> None:
    outcome = irc_main("eval", converted, "--flops-sweep", "0.6,0.75,0.9", "--json")
    assert outcome.code == 0, outcome.err
    sweep = outcome.json["flops_sweep"]
    assert [row["target"] for row in sweep] == [0.6, 0.75, 0.9]
    assert [row["flops_ratio"] for row in sweep] == pytest.approx([0.6, 0.75, 0.9], abs=0.03)
    alone = irc_main("eval", converted, "--flops", "0.6", "--json").json
    assert alone["flops_ratio"] == pytest.approx(sweep[0]["flops_ratio"])
    assert alone["target"] == {"flops": 0.6}
    table = irc_main("eval", converted, "--flops", "0.9").out
    first = next(line for line in table.splitlines() if "(target" in line)
    assert first.startswith("FLOPs")
    assert "(target 0.900)" in first


def test_an_export_remembers_it(converted: Path, irc_main: Any, text_file: Path, tmp_path: Path) -> None:
    assert irc_main("export", converted, "-o", tmp_path / "onnx", "--flops", "0.6").code == 0
    manifest = json.loads((tmp_path / "onnx" / "irc.json").read_text())
    assert (manifest["dial"], manifest["dial_flops"]) == (None, 0.6)
    verified = irc_main(
        "verify", tmp_path / "onnx", "--data", text_file, "--seq-len", "16", "--tokens", "256", "--json"
    )
    assert verified.code == 0, verified.err
    assert verified.json["routing_agreement"] > 0.999


def test_a_turned_bundle_is_saved_with_its_target(converted: Path, tmp_path: Path) -> None:
    irc.load(converted, flops=0.7).save_pretrained(tmp_path / "turned")
    config = json.loads((tmp_path / "turned" / "irc_config.json").read_text())
    assert (config["target"], config["dial"]) == ({"flops": 0.7}, [])


def test_what_cannot_be_turned_is_refused(converted: Path, irc_main: Any, model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"0\.5 .*0\.6 .*0\.9"):
        irc.load(converted, flops=0.5)
    with pytest.raises(InputError, match=r"sparsity.* flops from 0\.6 to 0\.9"):
        irc.load(converted, sparsity=0.7)
    with pytest.raises(InputError, match=r"0\.7.*0\.8"):
        irc.load(converted, sparsity=0.7, flops=0.8)
    outcome = irc_main("eval", converted, "--sparsity", "0.2", "--flops", "0.8")
    assert (outcome.code, "(--sparsity, --flops)" in outcome.sentence()) == (2, True)
    for flags in (("--flops", "0.7"), ("--flops-sweep", "0.7")):
        outcome = irc_main("eval", model_folder, *flags)
        assert (outcome.code, str(model_folder) in outcome.sentence()) == (2, True)
    outcome = irc_main("bench", "--flops", "0.8")
    assert (outcome.code, "--flops" in outcome.sentence()) == (2, True)


@pytest.mark.parametrize("dial", [[{"flops": 0.6}, {"sparsity": 0.7}], [{"flops": 0.9}, {"flops": 0.6}], [{}]])
def test_a_dial_of_no_one_kind_is_damage(converted: Path, tmp_path: Path, dial: list[dict[str, float]]) -> None:
    config = json.loads((converted / "irc_config.json").read_text())
    point = {key: config["dial"][0][key] for key in ("shift", "keep")}
    (tmp_path / "irc_config.json").write_text(json.dumps(config | {"dial": [one | point for one in dial]}))
    with pytest.raises(InputError, match="damaged"):
        irc.load(tmp_path)
