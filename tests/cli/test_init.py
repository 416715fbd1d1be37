"""`uniapl init` writes files that `check` and `train` accept, for every case."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from support.runs import lines
from support.templates import byte_tokenizer, template
from support.tiny import SMALL
from uniapl import cli
from uniapl.cli.init import CASES


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model whose tokenizer knows every byte, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer(template("qwen3"), "<|im_end|>")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3Config(**(SMALL | sizes))).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    return "tiny"


def rewards_of(directory: Path) -> Any:
    spec = importlib.util.spec_from_file_location("starter_rewards", directory / "rewards.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_check_and_train_accept_every_case(case: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of every case are used as they are; only the model and the number of steps are small."""
    assert cli.run(["init", case, "-o", "mine/first", "--model", model]) == 0
    assert "uniapl check mine/first/recipe.yaml" in capsys.readouterr().out
    assert cli.run(["check", "mine/first/recipe.yaml"]) == 0
    assert capsys.readouterr().out.endswith("ok\n")
    small = ["--max-steps", "2", "--rollout.max-completion-length", "4"]
    assert cli.run(["train", "mine/first/recipe.yaml", *small, "--quiet"]) == 0
    assert [record["step"] for record in lines(Path("runs", case, "metrics.jsonl"))] == [1, 2]


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("style", "preferences")])
def test_the_demonstrations_have_the_full_reward(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example rows are right by their own reward, which a wrong answer does not get."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["init", case]) == 0
    directory = tmp_path / case
    module = rewards_of(directory)
    name = next(name for name in ("same_number", "followed", "has_answer") if hasattr(module, name))
    rows = [row for row in read(directory / "train.jsonl") if "completion" in row]
    assert len(rows) >= 8
    columns = {key for row in rows for key in row} - {"prompt", "completion"}
    arguments = {key: [row.get(key) for row in rows] for key in columns}
    reward = getattr(module, name)
    assert reward([row["completion"] for row in rows], **arguments) == [1.0] * len(rows)
    wrong: Any = "I do not know" if case != "tools" else [{"role": "assistant", "content": "I do not know"}]
    assert max(reward([wrong] * len(rows), **arguments)) < 1


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rewards_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["init", "math"]) == cli.run(["init", "instructions"]) == cli.run(["init", "tools"]) == 0
    same_number = rewards_of(tmp_path / "math").same_number
    texts = ["#### 1,200", "1200", "12\n####-3.5", [{"role": "assistant", "content": "#### 7"}]]
    assert same_number(texts, [1200, 1200, -3.5, 8]) == [1.0, 0.0, 1.0, 0.0]
    followed = rewards_of(tmp_path / "instructions").followed
    columns = {"max_words": [2, 2, None], "include": ["Tea", "tea", None], "ending": [None, "!", None]}
    assert followed(["hot tea", "a cup of tea!", "x"], **columns) == [1.0, 2 / 3, None]
    tools = rewards_of(tmp_path / "tools")
    assert tools.age("Ada") == 36
    with pytest.raises(ValueError, match="known names: Ada, Alan"):
        tools.age("Bo")
    answers = [[{"role": "assistant", "content": text}] for text in ("36 + 41 = 77.", "77 or 78", "no", "")]
    assert tools.has_answer(answers, [77] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_file_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written if one file differs; the same files may be written twice."""
    target = tmp_path / "mine"
    assert cli.run(["init", "math", "-o", str(target)]) == 0
    assert cli.run(["init", "math", "-o", str(target)]) == 0
    (target / "train.jsonl").write_text("my own rows")
    (target / "rewards.py").unlink()
    assert cli.run(["init", "math", "-o", str(target)]) == 2
    assert f"'{target / 'train.jsonl'}' already exists" in capsys.readouterr().err
    assert (target / "train.jsonl").read_text() == "my own rows"
    assert not (target / "rewards.py").exists()


def test_errors_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "maths", "-o", str(tmp_path / "x")]) == 2
    assert "unknown case 'maths': choose one of math, instructions, style" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.run(["init", "math", "-o", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
