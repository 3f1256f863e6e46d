"""What a folder of somebody else's cannot do: name files outside of it, bring code, load a pickle, ask the network."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import irc
from exporters.onnx_format import MANIFEST
from irc.bundle.layout import CONFIG
from irc.bundle.saving import save_bundle
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.model.checkpoint import find_base
from irc.model.routed import RoutedForCausalLM
from irc.runtime.folder import open_folder
from irc.runtime.session import Runtime

Make = Callable[..., RoutedForCausalLM]

WATCH = """
import json, os, sys
seen, folder = [], os.path.realpath(sys.argv[1])
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "pickle.find_class"):
        seen.append([event, str(arguments)])
    elif event in ("exec", "import") and folder in str(arguments[:2]):
        seen.append([event, str(arguments)])
sys.addaudithook(watch)
from irc.cli import main
codes = [main(command) for command in json.loads(sys.argv[2])]
print(json.dumps({"codes": codes, "seen": seen}), file=sys.stderr)
"""


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def bundle(make_routed: Make, tmp_path: Path) -> Path:
    save_bundle(make_routed(), tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def watched(folder: Path, *commands: list[str]) -> dict[str, Any]:
    """Run commands in a process that writes down every connection, unpickling and run of a folder's code."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(folder), json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"},
        timeout=300,
    )
    found: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return found | {"err": done.stderr}


def test_the_watch_sees_what_it_looks_for(tmp_path: Path) -> None:
    """The test of the tests below: an address that is looked up and a pickle are seen."""
    source = f"import pickle, socket\npickle.loads({pickle.dumps(Path())!r})\n"
    (tmp_path / "evil.py").write_text(source)
    evil = "sys.path.insert(0, folder)\nmain = lambda _: __import__('evil').__name__"
    code = WATCH.replace("from irc.cli import main", evil)
    command = [sys.executable, "-c", code, str(tmp_path), "[[]]"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = {event for event, _ in json.loads(done.stderr.strip().splitlines()[-1])["seen"]}
    assert {"pickle.find_class", "exec"} <= events


@pytest.mark.slow
def test_local_folders_ask_no_network_unpickle_nothing_and_run_no_code(
    copied: Path, text_file: Path, convert_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Convert, export and generate, on a folder that also holds pickles and Python that claim to be needed."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (copied / name).write_bytes(pickle.dumps(Path("x")))
    (copied / "modeling_evil.py").write_text("raise SystemExit('code of the folder was run')\n")
    auto = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(copied / "config.json", lambda c: c.update(auto_map=auto))
    edit(copied / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": [None, "modeling_evil.T"]}))
    arguments = convert_arguments(tmp_path / "b", lff__steps=1, router__steps=1)
    arguments[1] = str(copied)
    bundle, onnx = str(tmp_path / "b"), str(tmp_path / "onnx")
    done = watched(copied, arguments, ["export", bundle, "-o", onnx], ["generate", onnx, "the", "-n", "2"])
    assert done["codes"] == [0, 0, 0], done["err"]
    assert done["seen"] == []
    assert not list((tmp_path / "onnx").glob("*.py"))


def test_onnx_runtime_keeps_no_events_for_its_maker(dense: Path, tmp_path: Path) -> None:
    """Its telemetry is outside of Python, where the watch sees nothing; it begins with files in the home folder."""
    code = "import sys; from pathlib import Path; from irc.runtime.session import Runtime; Runtime(Path(sys.argv[1]))"
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run([sys.executable, "-c", code, str(dense)], env={**kept, "HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_model_type_is_not_run_and_a_hub_id_of_a_bundle_not_downloaded(
    copied: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "evil.py").write_text("raise SystemExit('code of the folder was run')\n")
    edit(copied / "config.json", lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "evil.Config"}))
    edit(bundle / CONFIG, lambda c: c["base"].update(name="nobody/nothing"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = watched(tmp_path, *(["eval", str(folder), "--data", __file__] for folder in (copied, bundle)))
    assert (done["codes"], done["seen"]) == ([2, 2], []), done["err"]
    refusals = [line for line in done["err"].splitlines() if line.startswith("error: ")]
    assert "config.json" in refusals[0]
    assert "nobody/nothing" in refusals[1]
    assert "--base" in refusals[1]


NAMES = ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", "a\0b", 5]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_shards_outside_of_the_folder(copied: Path, name: Any) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"index.json: names the file"):
        _ = find_base(str(copied)).shards


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "spm_file", "sp_model", "source_spm"])
def test_tokenizer_files_outside_of_the_folder(copied: Path, key: str) -> None:
    edit(copied / "tokenizer_config.json", lambda c: c.update({key: "../secret"}))
    with pytest.raises(InputError, match=r"tokenizer_config.json: names the file '../secret'"):
        _ = find_base(str(copied)).tokenizer


FOLLOWED = {
    "gguf_file": "SECRET",
    "fast_tokenizer_files": ["../secret/tokenizer.1.0.json"],
    "init_inputs": ["SECRET", "SECRET"],
    "vocab": "SECRET",
    "merges": "SECRET",
}


@pytest.mark.parametrize("key", FOLLOWED)
def test_names_that_transformers_follows_out_of_the_folder(copied: Path, key: str) -> None:
    """A tokenizer outside of the folder is not opened, whether or not this version of transformers would open it."""
    secret = copied.with_name("secret")
    secret.mkdir()
    shutil.move(copied / "tokenizer.json", secret / "tokenizer.1.0.json")
    value = json.loads(json.dumps(FOLLOWED[key]).replace("SECRET", str(secret / "tokenizer.1.0.json")))
    edit(copied / "tokenizer_config.json", lambda c: c.update({key: value}))
    with pytest.raises(InputError, match=rf"tokenizer_config\.json.*{key}"):
        _ = find_base(str(copied)).tokenizer


def test_a_path_that_nothing_reads_is_no_offence(copied: Path) -> None:
    """As tokenizers that were saved long ago have it: a path of whoever made them."""
    edit(copied / "tokenizer_config.json", lambda c: c.update(special_tokens_map_file="/home/x/map.json"))
    assert len(find_base(str(copied)).tokenizer) == 257


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_extra.txt"])
@pytest.mark.parametrize("target", ["outside", "/etc/hostname", "/dev/zero", "itself"])
def test_links_that_lead_out_of_a_model(copied: Path, tmp_path: Path, name: str, target: str) -> None:
    place = {"outside": tmp_path / "outside", "itself": copied / name}.get(target, Path(target))
    if (copied / name).exists():
        shutil.move(copied / name, tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("{}")
    (copied / name).symlink_to(place)
    with pytest.raises(InputError, match=rf"{name}: is a link that leads out|no config.json"):
        find_base(str(copied))


def test_links_that_stay_inside(copied: Path, tmp_path: Path) -> None:
    """A link to the folder, a link inside it, and the links of the Hugging Face cache are as good as files."""
    (tmp_path / "name").symlink_to(copied)
    shutil.move(copied / "model.safetensors", copied / "weights")
    (copied / "model.safetensors").symlink_to("weights")
    assert find_base(str(tmp_path / "name")).config.hidden_size == 32
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(copied, snapshot)
    shutil.move(snapshot / "config.json", cache / "blobs" / "abc")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert find_base(str(snapshot)).config.hidden_size == 32


@pytest.mark.parametrize("name", ["irc_adapter.safetensors", "irc_config.json", "lora/adapter_model.safetensors"])
def test_links_that_lead_out_of_a_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / "lora").mkdir()
    place = bundle / name
    if place.exists():
        shutil.move(place, tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("{}")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{place.name}: is a link that leads out of its folder"):
        irc.load(bundle)


@pytest.fixture
def altered(dense: Path, tmp_path: Path) -> Path:
    """An ONNX folder to be altered."""
    return Path(shutil.copytree(dense, tmp_path / "onnx"))


def sign(folder: Path) -> None:
    """Write the hashes of the files as they are: whoever alters a folder can do that too."""
    edit(folder / MANIFEST, lambda m: m["sha256"].update({n: file_sha256(folder / n) for n in m["sha256"]}))


def test_weights_outside_of_an_onnx_folder(altered: Path, tmp_path: Path) -> None:
    original = (altered / "model.onnx").read_bytes()
    shutil.copy(altered / "model.onnx.data", tmp_path / "model.onnx.data")
    Runtime(altered)
    places = ("../model.onnx.data", str(tmp_path / "model.onnx.data"), "./../model.onnx.data", "config.json", "")
    for place in places:
        model = onnx.load_from_string(original)
        moved = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in moved.external_data if entry.key == "location").value = place
        (altered / "model.onnx").write_bytes(model.SerializeToString())
        sign(altered)
        with pytest.raises(InputError, match=re.escape(str(altered))):
            Runtime(altered)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-4", "999999999999999", "x", "9" * 5000])
def test_weights_larger_than_their_file(altered: Path, key: str, value: str) -> None:
    model = onnx.load(altered / "model.onnx", load_external_data=False)
    entries = next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data
    next(entry for entry in entries if entry.key == key).value = value
    (altered / "model.onnx").write_bytes(model.SerializeToString())
    sign(altered)
    with pytest.raises(InputError, match=re.escape(str(altered))):
        Runtime(altered)


def test_links_that_lead_out_of_an_onnx_folder(altered: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        shutil.move(altered / name, tmp_path / name)
        (altered / name).symlink_to(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: is a link that leads out of its folder"):
            open_folder(altered)
        (altered / name).unlink()
        shutil.move(tmp_path / name, altered / name)
    open_folder(altered)
    (altered / "a" / "b").mkdir(parents=True)
    shutil.move(altered / "model.onnx", tmp_path / "model.onnx")
    (altered / "a" / "1").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        open_folder(altered)
