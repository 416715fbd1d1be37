"""`uniapl evaluate` of a run's model: prompts and stop strings as the run had them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.runs import lines, recipe, train, write_recipe
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.cli import evaluate

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}"
    "{% if m.role == 'assistant' and thinking is false %},,{% endif %}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% if thinking is false %},,{% endif %}{% endif %}"
)
MESSAGES = [{"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"}] * 4


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The first prompt of each evaluation, as the model reads it, and the stop strings."""
    found: list[tuple[str, list[str]]] = []
    original = evaluate.evaluate_suite

    def recorded(suite: Any, sampler: Any, *arguments: Any, **options: Any) -> Any:
        strings = sampler.settings.stop_strings
        prompt = str(make_tokenizer().decode(list(suite.examples[0].prompt_ids)))
        found.append((prompt, list(strings.strings) if strings else []))
        return original(suite, sampler, *arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate_suite", recorded)
    return found


def run_of(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """The model of a run of one step, whose tokenizer has a chat template."""
    model = save_model(tmp_path / "model", chat_template=TEMPLATE)
    values = recipe(model, tmp_path / "run", max_steps=1, method="sft", **changes)
    train(values, train_dataset=rows, reward_functions=[])
    return tmp_path / "run" / "final"


def evaluated(model: Path, tmp_path: Path, *flags: str) -> Sequence[str]:
    """Evaluate on one string prompt; returns the notes."""
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "hi"}) + "\n")
    out = tmp_path / f"out-{len([*tmp_path.glob('out-*')])}"
    words = [str(model), "--suites", str(suite), "--rewards", "lowercase", "--max-completion-length", "3"]
    assert cli.run(["evaluate", *words, "--output-dir", str(out), *flags]) == 0
    return json.loads((out / "results.json").read_text())["notes"]


def test_a_run_with_text_prompts_is_evaluated_with_text_prompts(
    tmp_path: Path, seen: list[tuple[str, list[str]]]
) -> None:
    final = run_of(tmp_path, letter_rows(), rollout={"stop_strings": ["bj"]})
    (note,) = evaluated(final, tmp_path)
    assert "as in" in note
    assert "prompt_format text" in note
    assert "stop_strings ['bj']" in note
    evaluated(final, tmp_path, "--prompt-format", "chat", "--stop-strings", "q")
    assert seen == [("hi", ["bj"]), ("<turn>uhi<eos><turn>a", ["q"])]


def test_a_run_with_messages_is_evaluated_with_its_template_arguments(
    tmp_path: Path, seen: list[tuple[str, list[str]]]
) -> None:
    data = {"system_prompt": "be", "chat_template_kwargs": {"thinking": False}}
    final = run_of(tmp_path, MESSAGES, data=data)
    evaluated(final, tmp_path)
    evaluated(final, tmp_path, "--system-prompt", "no", "--chat-template-kwargs", "{}")
    evaluated(final, tmp_path, "--prompt-format", "text")
    assert [prompt for prompt, _ in seen] == [
        "<turn>sbe<eos><turn>uhi<eos><turn>a,,",
        "<turn>sno<eos><turn>uhi<eos><turn>a",
        "hi",
    ]
    assert lines(tmp_path / "out-2" / "completions.jsonl")[0]["prompt"] == "hi"


def test_a_recipe_takes_precedence_and_the_difference_is_noted(
    tmp_path: Path, seen: list[tuple[str, list[str]]]
) -> None:
    final = run_of(tmp_path, letter_rows())
    as_chat = str(write_recipe(tmp_path, final, data={"prompt_format": "chat", "system_prompt": "be"}))
    notes = evaluated(final, tmp_path, "--recipe", as_chat)
    assert seen[0][0] == "<turn>sbe<eos><turn>uhi<eos><turn>a"
    assert notes == [
        f"system_prompt is be, as in {as_chat}; the run that saved the model had None",
        f"prompt_format is chat, as in {as_chat}; the run that saved the model had text",
    ]
    assert evaluated(final, tmp_path, "--recipe", str(tmp_path / "run" / "config.yaml")) == []


def test_a_model_outside_a_run_has_the_format_of_its_tokenizer(
    tmp_path: Path, seen: list[tuple[str, list[str]]]
) -> None:
    model = save_model(tmp_path / "model", chat_template=TEMPLATE)
    assert evaluated(model, tmp_path) == []
    assert seen == [("<turn>uhi<eos><turn>a", [])]
