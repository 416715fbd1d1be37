"""Rows of data in whole runs."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import uniapl
from support.runs import recipe, train
from support.tiny import make_tokenizer, save_model
from uniapl.config import DataConfig
from uniapl.data.reading import read_rows


def test_demonstrations_end_where_rollouts_end(tmp_path: Path) -> None:
    """A model whose turns end with another token than its tokenizer's: both kinds of rows end with it."""
    path = save_model(
        tmp_path / "model", chat_template="{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    )
    GenerationConfig(eos_token_id=[1, 3]).save_pretrained(path)
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": "bb"}] * 4
    seen: list[Any] = []

    def watch(completions: list[Any], completion_ids: list[list[int]]) -> list[float]:
        seen.append(completion_ids)
        return [0.0] * len(completions)

    values = recipe(path, tmp_path / "run", max_steps=1, rollout={"num_generations": 64})
    train(values, train_dataset=rows, reward_functions=[watch])
    tokenizer = make_tokenizer()
    # The first call is the trial on demonstrations.
    assert [tokenizer.decode(ids) for ids in seen[0]] == ["bb<turn>", "bb<turn>"]
    ends = {ids[-1] for ids in seen[1] if len(ids) < 6}
    assert ends == {1, 3}
    assert not any({1, 3} & set(ids[:-1]) for ids in seen[1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": None}]},
            "row 1: 'completion' must be",
        ),
        ({"prompt": "a\ud800b"}, "row 1: tokenisation failed"),
        (
            {"prompt": "a", "question": "b"},
            "row 1: data.columns renames 'question' to 'prompt', which is also a column",
        ),
    ],
)
def test_odd_rows(row: dict[str, Any], message: str, model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run", data={"columns": {"question": "prompt"}})
    with pytest.raises(uniapl.UsageError, match=message):
        train(values, train_dataset=[row])


def test_a_system_prompt_for_plain_text_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError, match=r"data\.system_prompt does not apply"):
        train(recipe(model_dir, tmp_path / "run", data={"system_prompt": "be brief"}))


def test_a_file_of_another_kind_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("{}")
    with pytest.raises(uniapl.UsageError, match=r"must end in \.jsonl"):
        read_rows(DataConfig(path=str(tmp_path / "rows.txt")))
