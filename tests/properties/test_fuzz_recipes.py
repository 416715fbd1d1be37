"""Recipes and flags of every kind end well or with one clear message, never with a traceback."""

import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from support.fuzzing import Said, assert_clear, json_values, say, scalars, small_recipe, texts, tries
from support.tiny import letter_rows, save_model
from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.resolve import flatten

# What would run code that a recipe names, or a server or benchmark that it asks for.
NEVER = {
    "model.trust_remote_code",
    "discriminator.trust_remote_code",
    "rewards.allow_code_verifiers",
    "rewards.functions",
    "evaluation.suites",
}
KEYS = [*sorted(flatten(Config()).keys() - NEVER), "stages"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and rows."""
    path = tmp_path_factory.mktemp("fuzz")
    save_model(path / "model", chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows(4)))
    return path


def right_values(key: str) -> st.SearchStrategy[Any]:
    """Values that a key might well have: its default, its choices, numbers of its size."""
    model: Any = Config
    *sections, leaf = key.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[leaf]
    choices = (
        list(typing.get_args(field.annotation)) if typing.get_origin(field.annotation) is Literal else []
    )
    default = field.get_default()
    numbers = [] if isinstance(default, str | bool | dict | tuple) else [0, 1, 2, 0.5, 64]
    return st.sampled_from([list(default) if isinstance(default, tuple) else default, *choices, *numbers])


changes = st.sampled_from(KEYS).flatmap(
    lambda key: st.tuples(st.just(key), right_values(key) | right_values(key) | json_values)
)
some_changes = st.lists(changes, min_size=1, max_size=3).map(dict)
methods = st.sampled_from(sorted(METHODS))
stage_changes = st.dictionaries(
    st.sampled_from(["optim", "objective", "discriminator", "early_stopping", "max_steps", "model", "x"]),
    st.just({}) | st.integers(1, 3) | json_values,
    max_size=2,
)
stages = st.tuples(st.fixed_dictionaries({"method": methods | methods | scalars}), stage_changes).map(
    lambda parts: parts[0] | parts[1]
)
recipes = st.one_of(
    some_changes,
    some_changes,
    st.fixed_dictionaries({"stages": st.lists(stages | stages | json_values, max_size=3) | json_values}),
    st.dictionaries(texts | scalars.filter(lambda key: key == key), json_values, max_size=2),
    st.dictionaries(st.sampled_from(list(Config.model_fields)), json_values, min_size=1, max_size=1),
)


def check(folder: Path, content: str | bytes, *flags: str) -> Said:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return say("check", str(path), *flags)


@tries(120)
@given(changed=recipes, as_json=st.booleans())
def test_recipes_of_odd_values(changed: dict[Any, Any], as_json: bool, folder: Path) -> None:
    recipe = small_recipe(folder / "model", folder) | changed
    assert_clear(check(folder, yaml.safe_dump(recipe), *(["--json"] if as_json else [])))


flags = st.lists(
    st.tuples(st.sampled_from(KEYS) | texts, scalars.map(str) | json_values.map(repr), st.booleans()),
    min_size=1,
    max_size=3,
)


@tries(20)
@given(chosen=flags)
def test_flags_of_odd_values(chosen: list[tuple[str, str, bool]], folder: Path) -> None:
    arguments: list[str] = []
    for key, value, joined in chosen:
        arguments += [f"--{key}={value}"] if joined else [f"--{key}", value]
    recipe = small_recipe(folder / "model", folder)
    assert_clear(check(folder, yaml.safe_dump(recipe), *arguments), by_parser=True)


yaml_pieces = st.sampled_from([
    "a", "optim", "seed", "stages", "method", "sft", ": ", ":", "- ", "\n", "\n  ", "\t", "[", "]", "{", "}",
    ",", "&a ", "*a", "*b", "!!int ", "!!binary ", "!!set ", "!!timestamp ", "!x ", "<<: ", "? ", "|\n  ",
    "!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", ">-\n", "---\n", "...\n", "%YAML 1.1\n",
    "# ", "'", '"', "\\ud800", "\\x00", "\0", "2020-13-45", "2020-01-01", "0x_", "0b_", "1:60", "1e999",
    ".nan", ".inf", "~", "yes", "\ufeff", "\x85", "9" * 5000,
])  # fmt: skip
entries = st.tuples(st.sampled_from(KEYS), st.lists(yaml_pieces, max_size=4).map("".join)).map(": ".join)
documents = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60),
    st.lists(yaml_pieces, max_size=20).map("".join),
    st.lists(entries, min_size=1, max_size=4).map("\n".join),
)


@tries(150)
@given(content=documents)
def test_recipes_of_any_text(content: str | bytes, folder: Path) -> None:
    assert_clear(check(folder, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: &a [*a]", "found unconstructable recursive node"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("seed: " + "9" * 5000, "contains a value that cannot be read"),
        ("seed: 0x_", "contains a value that cannot be read"),
        ("seed: 2020-13-45", "contains a value that cannot be read"),
        ("optim: {1: 2}", "the key '1' is not text; put it in quotes"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("method: " + "x" * 10_000, "unknown method 'xxx"),
        ("? " + "x" * 10_000 + "\n: 1", "unknown key 'xxx"),
    ],
)
def test_recipes_that_were_answered_by_a_traceback(content: str, message: str, folder: Path) -> None:
    said = check(folder, content)
    assert_clear(said)
    assert message in said.err
    assert len(said.err) < 1000


@pytest.mark.parametrize(
    "key", ["output_dir", "resume", "model.model_name_or_path", "discriminator.model_name_or_path"]
)
@pytest.mark.parametrize(
    "name", ["", "a\0b", "x" * 300, "recipe.yaml/x", "/proc/x", "\ud800", "~", "a/b", "[x]"]
)
def test_places_that_there_cannot_be(
    key: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(small_recipe(folder / "model", folder) | {key: name})
    )
    monkeypatch.chdir(tmp_path)
    assert_clear(say("train", "recipe.yaml"))


def test_a_recipe_that_is_no_file(folder: Path) -> None:
    for name in (str(folder), "a\0b", "x" * 300, str(folder / "nowhere.yaml")):
        said = say("check", name)
        assert_clear(said, "cannot read the recipe")


@pytest.mark.parametrize("value", ["\ud800", b"ab", "👧"])
def test_values_that_a_report_cannot_hold_as_they_are(value: str | bytes, folder: Path) -> None:
    stages = [{"method": "sft", "max_steps": 1, "early_stopping": {"metric": value}}]
    recipe = small_recipe(folder / "model", folder) | {"stages": stages}
    recipe["early_stopping"] = {"metric": str(value)}
    for flags in ([], ["--json"]):
        said = check(folder, yaml.safe_dump(recipe), *flags)
        assert said.code == 0
    assert json.loads(said.out)["values"]["early_stopping.metric"] == [str(value), "recipe"]
