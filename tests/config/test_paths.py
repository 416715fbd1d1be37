"""`~` is the home directory in every path of a recipe, of the flags and of a verb's arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.runs import recipe
from support.tiny import letter_rows, save_model
from uniapl import cli
from uniapl.config.resolve import load_recipe, resolve
from uniapl.errors import UsageError
from uniapl.files import expand_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory, which is not the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


PATHS: dict[str, Any] = {
    "output_dir": "~/run",
    "resume": "~/run/checkpoints/step-000001",
    "model": {"model_name_or_path": "~/model"},
    "data": {"path": ["~/a.jsonl", "~/b/*.csv"]},
    "rewards": {"functions": ["~/r.py:f", {"name": "~/s.py:g"}]},
    "discriminator": {"model_name_or_path": "~"},
    "evaluation": {"suites": ["~/held.jsonl", "name=~/other.jsonl", "ifeval"]},
}


def test_paths_of_a_recipe(home: Path) -> None:
    config = resolve(PATHS).config
    assert (config.output_dir, config.resume) == (f"{home}/run", f"{home}/run/checkpoints/step-000001")
    assert config.model.model_name_or_path == f"{home}/model"
    assert config.data.path == (f"{home}/a.jsonl", f"{home}/b/*.csv")
    assert [f.name for f in config.rewards.functions] == [f"{home}/r.py:f", f"{home}/s.py:g"]
    assert config.discriminator.model_name_or_path == str(home)
    assert config.evaluation.suites == (f"{home}/held.jsonl", f"name={home}/other.jsonl", "ifeval")
    assert resolve({}, ["--data.path=~/x.jsonl", "--output-dir", "~/y"]).config.data.path == f"{home}/x.jsonl"
    (home / "recipe.yaml").write_text("seed: 3")
    assert load_recipe("~/recipe.yaml") == {"seed": 3}


def test_other_texts_stay() -> None:
    values = {"data": {"system_prompt": "~/x", "path": "user/~name"}, "output_dir": "a/~/b"}
    config = resolve(values).config
    assert (config.data.system_prompt, config.data.path) == ("~/x", "user/~name")
    assert config.output_dir == "a/~/b"
    assert expand_home("~backup.jsonl") == "~backup.jsonl"


def test_a_user_who_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"output_dir: '~nobody-here/run': no such user; write \./~nobody"):
        resolve({"output_dir": "~nobody-here/run"})
    with pytest.raises(UsageError, match="no such user"):
        load_recipe("~nobody-here/recipe.yaml")
    assert cli.run(["report", "~nobody-here/run"]) == 2
    assert "'~nobody-here/run': no such user" in capsys.readouterr().err


def test_a_run_leaves_no_directory_called_tilde(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(home / "model")
    rows = "".join(json.dumps(row) + "\n" for row in letter_rows())
    (home / "rows.jsonl").write_text(rows)
    (home / "reward.py").write_text("def f(completions):\n    return [float(len(c)) for c in completions]\n")
    values = recipe(
        Path("~/model"),
        Path("~/run"),
        max_steps=1,
        data={"path": "~/rows.jsonl"},
        rewards={"functions": ["~/reward.py:f"]},
    )
    (home / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert cli.run(["train", "~/recipe.yaml", "--quiet"]) == 0
    assert cli.run(["report", "~/run", "--output=~/page.html"]) == 0
    assert cli.run(["export", "~/run", "-o", "~/exported"]) == 0
    flags = ["--suites=held=~/rows.jsonl", "--recipe=~/recipe.yaml", "--output-dir=~/scores"]
    assert cli.run(["evaluate", "~/run/final", *flags, "--max-completion-length", "3"]) == 0, (
        capsys.readouterr().err
    )
    for name in ("run/final", "page.html", "exported", "scores"):
        assert (home / name).exists(), name
    assert list((home.parent / "work").iterdir()) == []


def test_errors_about_the_paths_of_the_data_name_the_key() -> None:
    """A path or a list of paths: the error has the place in the list, not the names of the types."""
    for wrong, key in ((5, "data.path"), ([5], "data.path.0"), (["a", "~nobody-here/b"], "data.path.1")):
        with pytest.raises(UsageError) as caught:
            resolve({"data": {"path": wrong}})
        lines = str(caught.value).splitlines()
        assert lines[-1].startswith(f"{key}: ")
        assert not any("[" in line.partition(": ")[0] for line in lines)
