"""generation_config.json, stop tokens and chat templates of a model."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from support.runs import has_letter, recipe, train, write_recipe
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.config import EvaluationConfig, ModelConfig, RolloutConfig
from uniapl.config.resolve import resolve
from uniapl.errors import UsageError
from uniapl.models.generation import unused_generation_settings
from uniapl.models.loading import ModelSource, load_stop_ids, load_tokenizer
from uniapl.training.given import Given
from uniapl.training.preflight.load import load_inputs

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% endif %}"
)
NOT_USED = "not used from the model's generation_config.json: "


def notes(path: Path, *used: RolloutConfig | EvaluationConfig, **settings: Any) -> list[str]:
    GenerationConfig(**settings).save_pretrained(path)
    return unused_generation_settings(str(path), None, used)


def test_settings_that_are_not_used_are_reported(tmp_path: Path) -> None:
    rollout, evaluation = RolloutConfig(), EvaluationConfig()
    assert notes(tmp_path, rollout, evaluation, eos_token_id=[1, 2], pad_token_id=0) == []
    qwen = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (note,) = notes(tmp_path, rollout, **qwen)
    assert note.startswith(f"{NOT_USED}temperature: 0.6, top_k: 20, top_p: 0.95;")
    (note,) = notes(tmp_path, evaluation, no_repeat_ngram_size=3, **qwen)
    assert note.startswith(
        f"{NOT_USED}do_sample: True, no_repeat_ngram_size: 3, temperature: 0.6, top_k: 20, top_p: 0.95;"
    )
    same = {key: value for key, value in qwen.items() if key != "do_sample"} | {"repetition_penalty": 1.1}
    both = [RolloutConfig(**same), EvaluationConfig(**same)]  # type: ignore[arg-type]
    assert notes(tmp_path, *both, **qwen, repetition_penalty=1.1) == []
    (note,) = notes(tmp_path, both[0], evaluation, temperature=0.6, do_sample=True)
    assert "temperature: 0.6" in note, "where one place uses another value"
    assert notes(tmp_path, RolloutConfig(stop_strings=("a",)), stop_strings="a") == []
    assert notes(tmp_path, temperature=0.6, do_sample=True) == [], "where nothing is sampled"
    neutral = {"output_attentions": False, "num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert notes(tmp_path, rollout, evaluation, **neutral) == []


def test_a_file_that_transformers_made_from_the_model_is_not_reported(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert (model / "generation_config.json").exists()
    assert unused_generation_settings(str(model), None, [RolloutConfig(), EvaluationConfig()]) == []


def test_check_reports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    GenerationConfig(eos_token_id=1, repetition_penalty=1.05).save_pretrained(model)
    path = str(write_recipe(tmp_path, model))
    assert cli.run(["check", path]) == 0
    assert f"{NOT_USED}repetition_penalty: 1.05;" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["check", path, "--rollout.repetition-penalty", "1.05"]) == 0
    assert NOT_USED not in " ".join(capsys.readouterr().out.split())


def stop_ids_of(path: Path, **settings: Any) -> frozenset[int]:
    source = ModelSource.resolve(ModelConfig(model_name_or_path=str(path), **settings))
    return load_stop_ids(source, AutoConfig.from_pretrained(source.base), load_tokenizer(source))


@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}], ids=["full", "adapter"])
def test_stop_tokens_are_saved_with_the_model(
    lora: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    vocabulary = make_tokenizer().get_vocab()
    expected = {1, vocabulary["<turn>"], vocabulary["\n"]}
    values = recipe(model, tmp_path / "run", max_steps=1, method="sft")
    values["model"] |= {"stop_tokens": ["<turn>", "\n"], **lora}
    train(values, train_dataset=letter_rows(), reward_functions=[])
    final = tmp_path / "run" / "final"
    assert stop_ids_of(model) == {1}
    assert stop_ids_of(model, stop_tokens=["<turn>", "\n"]) == expected
    assert stop_ids_of(final) == expected
    said = " ".join("".join(capsys.readouterr()).split())
    assert "is ordinary text" not in said, "the user chose the token"
    assert cli.run(["export", str(final), "-o", str(tmp_path / "exported")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == sorted(expected)


def test_a_stop_token_that_is_none_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(UsageError, match=r"model.stop_tokens: '<\|im_end\|>' is not a token.*stop_strings"):
        stop_ids_of(model, stop_tokens=["<turn>", "<|im_end|>"])


def template_of(path: Path, template: Path | str) -> str | None:
    settings = ModelConfig(model_name_or_path=str(path), chat_template_path=str(template))
    return load_tokenizer(ModelSource.resolve(settings)).chat_template  # type: ignore[return-value]


def test_a_chat_template_from_a_file_or_a_tokenizer(tmp_path: Path) -> None:
    model, other = save_model(tmp_path / "model"), tmp_path / "other"
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(other)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert load_tokenizer(ModelSource(base=str(model))).chat_template is None
    assert template_of(model, tmp_path / "chat.jinja") == TEMPLATE
    assert template_of(model, other) == TEMPLATE


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "file not found"),
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.content }", "the chat template raised an error"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "'Answer.' is not in"),
        ("a constant", "'Question\\?' is not in"),
    ],
)
def test_a_chat_template_that_cannot_work_is_refused(template: str | None, said: str, tmp_path: Path) -> None:
    model, path = save_model(tmp_path / "model"), tmp_path / "chat.jinja"
    if template is not None:
        path.write_text(template)
    with pytest.raises(UsageError, match=rf"model\.chat_template_path '{path}'.*{said}"):
        template_of(model, path)


def test_a_tokenizer_without_a_template_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    model, path = save_model(tmp_path / "model"), tmp_path / "chat.jinja"
    with pytest.raises(UsageError, match="has no chat template"):
        template_of(model, model)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        template_of(model, path)
    with pytest.raises(
        UsageError, match=r"tokenizer of model\.chat_template_path '.*nothing': directory not"
    ):
        template_of(model, tmp_path / "nothing")


@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}], ids=["full", "adapter"])
def test_the_chat_template_is_used_in_training_and_saved(lora: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat_template="{{ messages[0].content }}")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "letter": "a"}] * 4
    values = recipe(model, tmp_path / "run", max_steps=1, save_steps=1, method="grpo")
    values["model"] |= {"chat_template_path": str(tmp_path / "chat.jinja"), **lora}
    train(values, train_dataset=rows)
    for saved in ("final", "checkpoints/step-000001"):
        tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "run" / saved)
        assert tokenizer.chat_template == TEMPLATE
    resolved = resolve(values)
    given = Given(train_dataset=rows, reward_functions=[has_letter])
    (example, *_) = load_inputs(resolved, [resolved], given).dataset.examples
    assert make_tokenizer().decode(list(example.prompt_ids)) == "<turn>uhi<eos><turn>a"
    assert cli.run(["export", str(tmp_path / "run"), "-o", str(tmp_path / "exported")]) == 0
    exported: Any = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.chat_template == TEMPLATE
