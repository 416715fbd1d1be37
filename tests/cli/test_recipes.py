"""`uniapl recipes` lists and copies what comes with the package."""

from pathlib import Path

import pytest

from support.documents import ROOT
from uniapl import cli


def test_every_recipe_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes"]) == 0
    listed, _, last = capsys.readouterr().out.rpartition("\n\n")
    lines = dict(line.split(maxsplit=1) for line in listed.splitlines())
    recipes = {
        path.relative_to(ROOT / "recipes").as_posix()
        for path in (ROOT / "recipes").rglob("*.yaml")
        if path.parent.name != "accelerate"
    }
    assert lines.keys() == recipes
    assert all(line.endswith(".") and len(line) > 30 for line in lines.values())
    assert "uniapl recipes -o recipes" in last


def test_copies_are_equal_and_changed_files_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["recipes", "-o", str(tmp_path)]) == 0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (ROOT / "recipes" / path.relative_to(tmp_path)).read_bytes()
    (tmp_path / "qwen3-4b.yaml").write_text("mine")
    assert cli.run(["recipes", "-o", str(tmp_path)]) == 2
    assert f"'{tmp_path / 'qwen3-4b.yaml'}' already exists" in capsys.readouterr().err
    assert (tmp_path / "qwen3-4b.yaml").read_text() == "mine"
