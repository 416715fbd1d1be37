"""The help of `demo`, `train` and `check` fits one screen; `--help-all` lists every key."""

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import uniapl
from uniapl import cli
from uniapl.cli.help import KEYS, RECIPE_ONLY
from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.resolve import flatten

RECIPE = "max_steps: 4321\nmodel.model_name_or_path: " + "x" * 200 + "\nrewards: {functions: [no_comma]}\n"
VERBS = pytest.mark.parametrize("verb", ["demo", "train", "check"])


@VERBS
def test_help_fits_one_screen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 45
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.startswith(f"usage: uniapl {verb} ")
    assert "--help-all lists every key" in shown
    assert "exit codes: 0 ok" in shown
    for key in KEYS:
        assert f"  {key}: " in shown


def test_help_of_demo_lists_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--write DIRECTORY", "--reward NAME"):
        assert flag in shown
    assert cli.run(["train", "--help"]) == 0
    assert "--write" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "collect", "compose", "compare"])
def test_help_of_options_fits_one_screen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run([verb, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 45
    assert max(map(len, shown.splitlines())) <= 100


def test_help_lists_keys_that_exist_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(KEYS) <= set(flatten(Config()))
    assert cli.run(["train", "-h"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 100 " in shown
    assert "model.lora_r: null " in shown
    flat = " ".join(shown.split())
    assert f"Training method: {', '.join(METHODS)}" in flat, "choices are listed"
    for kind in get_args(type(Config().discriminator).model_fields["kind"].annotation):
        assert kind in flat.split("discriminator.kind: ")[1]
    assert "..." not in shown.split("most important keys")[1]


@pytest.mark.parametrize("verb", ["train", "check"])
def test_help_of_a_recipe_shows_its_values(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert cli.run([verb, str(tmp_path / "recipe.yaml"), "--seed", "77", "--json", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 4321 " in shown
    assert "seed: 77 " in shown
    assert "rewards.functions: [no_comma] " in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert cli.run([verb, str(tmp_path / "missing.yaml"), "--help"]) == 2


@VERBS
def test_help_all_lists_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run([verb, "--help-all"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out.replace("-", "_")
    for key in flatten(Config()):
        assert (f"{key} (in the recipe only): " if key in RECIPE_ONLY else f"__{key}") in shown


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@VERBS
def test_help_imports_no_torch(verb: str, flag: str) -> None:
    code = (
        "import sys; from uniapl.cli import run\n"
        f"try: run(['{verb}', '{flag}'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_help_shows_the_signature_of_train() -> None:
    assert inspect.isfunction(uniapl.train)
    assert next(iter(inspect.signature(uniapl.train).parameters)) == "config"
    shown = pydoc.render_doc(uniapl.train)
    assert "train_dataset" in shown
    assert "reward_functions" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"uniapl {uniapl.__version__}\n"
