"""The recipes for Qwen3, checked on directories of those models' shapes, without weights."""

import json
import re
from pathlib import Path

import pytest
from transformers import Qwen3Config

from support.documents import ROOT, TEMPLATE, block, read_rows
from support.tiny import LETTERS, make_tokenizer
from uniapl import cli

COMMON = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, int]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
RECIPES = sorted((ROOT / "recipes").glob("qwen3-*.yaml"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models by their names, and the rows that the recipes speak of."""
    here = tmp_path_factory.mktemp("recipes")
    for name, shape in SHAPES.items():
        Qwen3Config(**COMMON, **shape).save_pretrained(here / "Qwen" / name)
        make_tokenizer(chat_template=TEMPLATE).save_pretrained(here / "Qwen" / name)
    [row] = read_rows(block("docs/gpus.md", '{"prompt"'))
    rows = [row | {"prompt": f"{row['prompt']} {letter}"} for letter in LETTERS]
    (here / "data").mkdir()
    path = here / "data" / "prompts_with_demonstrations.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return here


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_check_accepts_it(
    recipe: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    # A minute for each on a slow core; tests/training/preflight/test_memory.py compares it with runs.
    monkeypatch.setattr("uniapl.cli.check._memory", lambda *_: {"text": ""})
    # The directories hold configurations without weights.
    monkeypatch.setattr("uniapl.cli.check.check_policy", lambda *_: True)
    assert cli.run(["check", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["with_demonstration"] == report["examples"] == len(LETTERS)
    assert report["rewards"] == {"instruction_following": len(LETTERS)}
    [stage] = report["stages"]
    eight = recipe.stem.endswith("8gpu")
    assert stage["rollouts per step"] == (1024 if eight else 256)
    assert stage["demonstrations per step"] == (128 if eight else 64)
    assert not report["left_out"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(recipe: Path) -> None:
    evident = ("model_name_or_path", "path", "prompt_format")
    values = [line.strip() for line in recipe.read_text().splitlines() if re.match(r"  \w+: +[^ #]", line)]
    assert len(values) > 20
    for line in values:
        assert line.startswith(evident) or re.search(r"# \w", line), line
