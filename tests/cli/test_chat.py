"""`uniapl chat`: the prompts of training, and samples that only its flags change."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from support.runs import recipe, train
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.cli import chat
from uniapl.config import DataConfig
from uniapl.data.rows import tokenize_row

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}"
    "{% if m.role == 'assistant' and thinking is false %},,{% endif %}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% if thinking is false %},,{% endif %}{% endif %}"
)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model of `uniapl chat` reads."""
    seen: list[str] = []

    def load(source: Any) -> Any:
        model = original(source)
        generate: Any = model.generate

        def recorded(inputs: Any, **settings: Any) -> Any:
            seen.append(str(make_tokenizer().decode(inputs[0].tolist())))
            return generate(inputs, **settings)

        monkeypatch.setattr(model, "generate", recorded, raising=False)
        return model

    original = chat.load_model
    monkeypatch.setattr(chat, "load_model", load)
    return seen


def say(monkeypatch: pytest.MonkeyPatch, *arguments: str, text: str = "hi\n") -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.run(["chat", *arguments, "--max-new-tokens", "4"])


@pytest.mark.case(17)
@pytest.mark.parametrize("part", ["final", "checkpoints/step-000001"])
def test_prompts_are_those_of_the_run(
    part: str,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_model(tmp_path / "model", chat_template=TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"}] * 4
    data = {"system_prompt": "be", "chat_template_kwargs": {"thinking": False}}
    values = recipe(model, tmp_path / "run", max_steps=1, save_steps=1, method="sft", data=data)
    train(values, train_dataset=rows, reward_functions=[])
    example = tokenize_row(
        1, rows[0], make_tokenizer(chat_template=TEMPLATE), DataConfig.model_validate(data)
    )
    trained = str(make_tokenizer().decode(list(example.prompt_ids)))
    assert trained == "<turn>sbe<eos><turn>uhi<eos><turn>a,,"
    saved = str(tmp_path / "run" / part)
    assert say(monkeypatch, saved) == 0
    assert prompts == [trained]
    assert f"prompts as in {tmp_path / 'run' / 'config.yaml'}" in capsys.readouterr().err
    flags = ["--system", "no", "--chat-template-kwargs", json.dumps({"thinking": True})]
    assert say(monkeypatch, saved, *flags) == 0
    assert prompts[1] == "<turn>sno<eos><turn>uhi<eos><turn>a"
    assert say(monkeypatch, str(model)) == 0
    assert prompts[2] == "<turn>uhi<eos><turn>a", "a model outside a run"
    assert say(monkeypatch, saved, "--chat-template-kwargs", "[]") == 2


def test_plain_text_prompts_stay_plain_text(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base models come with a chat template, too."""
    model = save_model(tmp_path / "model", chat_template=TEMPLATE)
    train(recipe(model, tmp_path / "run", max_steps=1, method="sft"), train_dataset=letter_rows())
    final = str(tmp_path / "run" / "final")
    assert say(monkeypatch, final) == 0
    assert say(monkeypatch, final, "--prompt-format", "chat") == 0
    assert prompts == ["hi", "<turn>uhi<eos><turn>a"]
    assert say(monkeypatch, final, "--system", "be") == 2


def test_generation_config_changes_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", chat_template=TEMPLATE)
    said: list[str] = []
    for settings in ({}, {"top_k": 1, "repetition_penalty": 90.0, "do_sample": True}):
        GenerationConfig(eos_token_id=1, **settings).save_pretrained(model)
        for temperature in ("1", "0"):
            assert say(monkeypatch, str(model), "--temperature", temperature) == 0
            said.append(capsys.readouterr().out)
    assert said[:2] == said[2:]
    assert said[0] != said[1]
