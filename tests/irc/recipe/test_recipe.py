"""A recipe refuses what cannot work, in a sentence that names the place, the field, the value and what is allowed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irc.errors import InputError
from irc.recipe.policies import POLICIES
from irc.recipe.recipe import Recipe, load_recipe, recipe_fields, recipe_from
from irc.recipe.stages import LoraRecipe, RouterRecipe


def test_every_field_is_listed_with_its_help_by_the_name_that_sets_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # a pipe: no line is broken
    command = [sys.executable, "-m", "irc", "convert", "--fields"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    fields = recipe_fields()
    for name, _, text in fields:
        assert len(text) > 5
        line = next(line for line in shown.stdout.splitlines() if line.split()[:1] == [name])
        assert text in line
    assert {"sparsity", "lff.ridge", "router.steps", "lora.targets"} <= {name for name, _, _ in fields}
    assert load_recipe(None, [f"{name}={json.dumps(default)}" for name, default, _ in fields]) == Recipe()


USELESS = {
    "sparsity=1.5": ("sparsity", "1.5", "0 to 1"),
    "sparsity=.nan": ("sparsity", "nan"),
    "router.temperature_end=0": ("router.temperature_end", "0", "0.001"),
    "lff.ridge=-1": ("lff.ridge", "-1", "at least 0"),
    "lff.ridge=.nan": ("lff.ridge", "nan", "finite"),
    "router.lr=.inf": ("router.lr", "inf", "finite"),
    "router.start=-.inf": ("router.start", "-inf", "finite"),
    "router.start=infinity": ("router.start", "inf", "finite"),
    "router.lr=fast": ("router.lr", "'fast'", "number"),
    "router.lr=true": ("router.lr", "True", "number"),
    "rank=2.0": ("rank", "2.0", "whole number"),
    "rank=true": ("rank", "True", "whole number"),
    "rank=9007199254740993": ("rank", "9007199254740993", "9007199254740992"),
    "seed=-4294967297": ("seed", "-4294967297", "-4294967296"),
    "seq_len=1": ("seq_len", "1", "at least 2"),
    "lora.alpha=0": ("lora.alpha", "0", "at least 1"),
    "lora.dropout=1": ("lora.dropout", "1", "less than 1"),
    "lora.targets=[]": ("lora.targets", "[]"),
    "lora.targets=[1]": ("lora.targets[0]", "1", "text"),
    "lora.targets=q_proj": ("lora.targets", "'q_proj'", "list"),
    "dial=[true]": ("dial[0]", "True"),
    "dial=[0.1, 2]": ("dial[1]", "2", "at most 1"),
    "router.target_range=[0.1, 0.6]": ("router.target_range", "[0.1, 0.6]", "removed", "dial"),
    "router.budget=flops": ("router.budget", "'flops'", "removed", "target in flops"),
    "router.clip=1": ("router.clip", "1", "removed", "docs/results.md"),
    "router.distill=-0.5": ("router.distill", "-0.5", "0 to 1"),
    "forecaster=relu": ("forecaster", "'relu'", "linear, silu"),
    "router.reads=all": ("router.reads", "'all'", "choose from unit, stream, layer, bottleneck"),
    "policy=greedy": ("policy", "'greedy'", ", ".join(POLICIES)),
    "dtype=int8": ("dtype", "'int8'", "bf16"),
    "eval_split=train": ("eval_split", "'train'", "heldout, validation"),
    "kv_threshold=7": ("kv_threshold", "7"),
    "model=5": ("model", "5", "text"),
    "activation_checkpointing=1": ("activation_checkpointing", "1", "true or false"),
    "stages=[lff, train]": ("stages[1]", "'train'", "lff, router, lora"),
    "stages=[router]": ("stages", "router", "informed"),
    "stages=[lora, router, lff]": ("stages", "lora, router, lff"),
    "stages=[lff, lff, router]": ("stages", "lff, lff, router"),
}


@pytest.mark.parametrize("setting", USELESS)
def test_values_that_would_fail_only_after_training_or_mean_nothing(setting: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(None, [setting])
    for part in USELESS[setting]:
        assert part in str(refused.value)


CONFLICTS = [
    (["dial=[0.1, 0.5]", "policy=static"], ("dial", "static")),
    (["dial=[0.1, 0.5]", "policy=mod"], ("dial", "mod")),
    (["router.reads=bottleneck", "policy=skipgpt"], ("router.reads", "bottleneck", "skipgpt")),
    (["stages=[lff, router]", "policy=skipgpt"], ("stages", "lff, router", "skipgpt")),
]


@pytest.mark.parametrize(("settings", "parts"), CONFLICTS)
def test_values_that_do_not_go_together(settings: list[str], parts: tuple[str, ...]) -> None:
    for given in (settings, settings[::-1]):
        with pytest.raises(InputError) as refused:
            load_recipe(None, given)
        for part in parts:
            assert part in str(refused.value)


def test_only_the_end_has_to_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [lff, router]\n")
    recipe = load_recipe(path, ["policy=skipgpt", "stages=[router]"])
    assert (recipe.policy, recipe.stages) == ("skipgpt", ["router"])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads a file of YAML."""
    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "mine.yaml").write_text("model: ~/m\ndata: ~/t.txt\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.model, recipe.data) == ("/home/ada/m", ["/home/ada/t.txt"])
    assert (Recipe().model, Recipe(data=["hf:a~b"]).data) == ("demo", ["hf:a~b"])


def test_texts_and_whole_numbers_become_floats() -> None:
    recipe = load_recipe(None, ["router.lr=1e-3", "router.noise=1", "dial=[1e-1, 1]"])
    assert [(value, type(value)) for value in (recipe.router.lr, recipe.router.noise, *recipe.dial)] == [
        (0.001, float),
        (1.0, float),
        (0.1, float),
        (1.0, float),
    ]


@pytest.mark.parametrize("make", [lambda: Recipe(seed=10**5000), lambda: Recipe(sparsity=10**5000)])
def test_numbers_of_thousands_of_digits_are_refused_without_writing_them_out(make: object) -> None:
    with pytest.raises(InputError, match="5001 digits"):
        make()  # type: ignore[operator]


def test_setting_a_field_checks_it_and_a_refused_value_changes_nothing() -> None:
    recipe = Recipe(dial=[0.1])
    for name, value, part in (("sparsity", 2, "2"), ("policy", "static", "static"), ("sparsty", 0.5, "sparsty")):
        with pytest.raises(InputError, match=part):
            setattr(recipe, name, value)
    with pytest.raises(InputError, match="batch_size is 0"):
        recipe.router.batch_size = 0
    assert recipe == Recipe(dial=[0.1])
    greedy = Recipe(policy="skipgpt")
    greedy.router.reads = "bottleneck"  # a stage does not know the rest of the recipe
    with pytest.raises(InputError, match="skipgpt"):
        greedy.validated()


def test_parts_are_checked_when_they_are_made() -> None:
    for make, part in (
        (lambda: RouterRecipe(steps=-1), "steps is -1"),
        (lambda: LoraRecipe(dropout=1.5), "dropout is 1.5"),
        (lambda: Recipe(router={"batch_size": 0}), "router.batch_size is 0"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=part):
            make()


def test_copies_are_equal_and_independent() -> None:
    recipe = Recipe(dial=[0.1], router=RouterRecipe(steps=3))
    for other in (copy.deepcopy(recipe), recipe.validated(), recipe_from(recipe.to_dict())):
        assert other == recipe
        other.router.steps = 4
        other.dial.append(0.5)
    assert (recipe.router.steps, recipe.dial) == (3, [0.1])


@pytest.mark.parametrize("group", ["lff", "router", "lora"])
def test_a_group_is_not_a_value_and_its_example_is_a_field(group: str) -> None:
    for value, shown in {"5": "5", "{steps: 5}": "{'steps': 5}"}.items():
        with pytest.raises(InputError) as refused:
            load_recipe(None, [f"{group}={value}"])
        assert str(refused.value).startswith(f"{group} is {shown}")
        assert str(refused.value).rpartition(" ")[2] in [name for name, _, _ in recipe_fields()]


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("=3", ("=3", "key=value")),
        ("router.steps", ("router.steps", "key=value")),
        ("router.steps=[", ("router.steps=[", "YAML")),
        ("router.stps=3", ("unknown key router.stps", "router.steps")),
        ("rooter.steps=3", ("unknown key rooter.steps", "router")),
        ("sparsty=3", ("unknown key sparsty", "sparsity")),
        ("lora.xyzzy=3", ("unknown key lora.xyzzy", "the fields of lora are steps, ")),
        ("seed.seed=3", ("unknown key seed.seed", "seed has no fields")),
        (f"{'x' * 5000}=3", ("unknown key xxx",)),
    ],
)
def test_a_setting_without_a_field_names_the_nearest(setting: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(None, [setting])
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("router: {stps: 5}", ("unknown key router.stps", "router.steps")),
        ("router: {1: 5}", ("unknown key router.1",)),
        ("1: 5", ("unknown key 1",)),
        ("router: 5", ("router is 5", "keys and values")),
        ("router: {steps: {a: 1}}", ("router.steps is {'a': 1}",)),
        ("seed: many", ("seed is 'many'", "whole number")),
        ("seed: null", ("seed is None", "whole number")),
        ("policy: [informed]", ("policy is ['informed']",)),
        ("dial: 0.5", ("dial is 0.5", "list")),
        ("stages: [router]", ("stages are router",)),
    ],
)
def test_what_a_file_holds_is_refused_with_the_files_name(tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    for settings in ([], ["seed=1", "rank=2"]):
        with pytest.raises(InputError) as refused:
            load_recipe(path, settings)
        assert str(refused.value).startswith(f"recipe {path}: ")
        for part in parts:
            assert part in str(refused.value)


@pytest.mark.parametrize(
    ("given", "context", "window"), [(None, None, 1024), (None, 8192, 1024), (None, 512, 512), (64, 512, 64)]
)
def test_a_window_is_as_long_as_given_or_as_the_context_allows(
    given: int | None, context: int | None, window: int
) -> None:
    recipe = Recipe(seq_len=given)
    assert recipe.seq_len_for(context) == window
    with pytest.raises(InputError, match="seq_len is 64, but the model's context is 48; give at most 48"):
        Recipe(seq_len=64).seq_len_for(48)


@pytest.mark.parametrize(
    ("given", "context", "windows"),
    [
        ({}, None, (256, 1024)),
        ({}, 128, (128, 128)),
        ({"seq_len": 64}, None, (64, 64)),
        ({"seq_len": 2048}, None, (2048, 2048)),
        ({"train_seq_len": 512}, None, (512, 1024)),
        ({"train_seq_len": 512, "seq_len": 64}, None, (512, 64)),
    ],
)
def test_training_reads_short_windows_unless_told_otherwise(
    given: dict[str, int], context: int | None, windows: tuple[int, int]
) -> None:
    recipe = Recipe(**given)
    recipe.fit_windows(context)
    assert (recipe.train_window, recipe.window) == windows


def test_a_training_window_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match="train_seq_len is 512, but the model's context is 48; give at most 48"):
        Recipe(train_seq_len=512).fit_windows(48)


@pytest.mark.parametrize(
    ("given", "width", "ranks"),
    [
        ({}, 576, (57, 114)),
        ({}, 4096, (100, 200)),
        ({}, 1, (1, 1)),
        ({"rank": 8}, 64, (8, 8)),
        ({"ffn_rank": 3}, 64, (6, 3)),
        ({"rank": 8, "ffn_rank": 4}, 64, (8, 4)),
    ],
)
def test_a_given_rank_is_for_all_units_and_ffn_have_twice_the_default(
    given: dict[str, int], width: int, ranks: tuple[int, int]
) -> None:
    recipe = Recipe(**given)
    recipe.fit_ranks(width)
    assert (recipe.rank, recipe.ffn_rank) == ranks
    recipe.fit_ranks(width)
    assert (recipe.rank, recipe.ffn_rank) == ranks


@pytest.mark.parametrize("name", ["rank", "ffn_rank"])
def test_a_rank_beyond_the_hidden_size_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is 65, but the model's hidden size is 64; give at most 64"):
        Recipe(**{name: 65}).fit_ranks(64)


def test_removed_fields_at_their_defaults_are_read() -> None:
    old = {"clip": 0.0, "noise_end": 1.0, "entropy_weight": 0, "budget": "model", "target_range": [], "steps": 3}
    assert recipe_from({"router": old}) == load_recipe(None, ["router.steps=3"])
    assert load_recipe(None, ["router.clip=0"]) == Recipe()
    assert not {"router.clip", "router.budget"} & {name for name, _, _ in recipe_fields()}


def test_a_single_text_needs_no_list() -> None:
    recipe = load_recipe(None, ["data=a.txt"])
    assert (recipe.data, recipe.to_dict()["data"]) == (["a.txt"], "a.txt")
    several = load_recipe(None, ["data=[a.txt, b.txt]", "data_weights=[2, 1]"])
    assert (several.data, several.to_dict()["data"], several.data_name) == (["a.txt", "b.txt"],) * 2 + (
        "a.txt + b.txt",
    )
    assert recipe_from(several.to_dict()) == several


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["data_weights=[1, 2]"], "data_weights are [1.0, 2.0] for 1 texts; give one number"),
        (["data=[a, b]", "data_weights=[0, 0]"], "one of them above 0"),
        (["data=[a, b]", "data_weights=[1, -1]"], "data_weights[1] is -1; give at least 0"),
        (["data=[]"], "data is []; give at least one entry"),
        (["data=5"], "data[0] is 5; give text"),
    ],
)
def test_texts_and_weights_that_do_not_fit_are_refused(settings: list[str], told: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(None, settings)
    assert told in str(refused.value)
