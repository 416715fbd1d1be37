"""Training's evaluation, `uniapl evaluate` and `uniapl chat` sample alike, and as `generate` does."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from support.runs import recipe, train
from support.tiny import make_model, make_tokenizer
from uniapl import cli
from uniapl.cli import evaluate

LIMIT = 24
PROMPTS = ["say a.", "hello", "a", "Any words, or none"]
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation_config.json would change every completion."""
    path = tmp_path_factory.mktemp("model")
    make_model("mistral_sliding", scale=6.0).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    settings = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 3}
    GenerationConfig(eos_token_id=1, **settings).save_pretrained(path)
    return path


def generated(path: Path, prompt: str, **settings: Any) -> str:
    """The most likely completion by transformers itself."""
    return str(TOKENIZER.decode(generated_ids(path, prompt, **settings), skip_special_tokens=True))


def generated_ids(path: Path, prompt: str, **settings: Any) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config = GenerationConfig()
    inputs = TOKENIZER(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    options = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": 1, "pad_token_id": 0}
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, tokenizer=TOKENIZER, **options | settings)
    return output[0, inputs.shape[1] :].tolist()


def suite(folder: Path) -> Path:
    path = folder / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "letter": "a"}) + "\n" for prompt in PROMPTS))
    return path


def evaluated(path: Path, folder: Path, *flags: str) -> tuple[list[str], dict[str, Any]]:
    """The completions of `uniapl evaluate`, and its results."""
    out = folder / f"out{len(list(folder.iterdir()))}"
    command = ["evaluate", str(path), "--suites", str(suite(folder)), "--rewards", "no_comma"]
    command += ["--max-completion-length", str(LIMIT), "--output-dir", str(out), *flags]
    assert cli.run(command) == 0
    found = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    return [one["completion"] for one in found], json.loads((out / "results.json").read_text())


def chatted(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, *flags: str) -> list[str]:
    """What `uniapl chat` answers to each prompt."""
    found: list[str] = []
    for prompt in PROMPTS:
        monkeypatch.setattr(sys, "stdin", io.StringIO(prompt + "\n"))
        capsys.readouterr()
        command = ["chat", str(path), "--temperature", "0", "--max-new-tokens", str(LIMIT), *flags]
        assert cli.run(command) == 0
        found.append(capsys.readouterr().out.removesuffix("\n"))
    return found


def test_evaluate_and_chat_complete_as_generate(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["bj", "\n\n"]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"repetition_penalty": 1.6}, ["--repetition-penalty", "1.6"]),
        ({"stop_strings": texts}, ["--stop-strings", *texts]),
        ({"eos_token_id": [1, TOKENIZER("g").input_ids[0]]}, ["--stop-tokens", "g"]),
    ]
    found: list[list[str]] = []
    results: dict[str, Any] = {}
    for settings, flags in cases:
        expected = [generated(model_dir, prompt, **settings) for prompt in PROMPTS]
        # Greedy decoding takes the most likely token under every truncation.
        completions, results = evaluated(model_dir, tmp_path, *flags, "--min-p", "0.2", "--top-p", "0.5")
        assert completions == expected
        assert chatted(model_dir, monkeypatch, capsys, *flags, "--min-p", "0.2") == expected
        lengths = [len(generated_ids(model_dir, prompt, **settings)) for prompt in PROMPTS]
        assert results["suites"]["held_out"]["truncated"] == lengths.count(LIMIT) / 4
        assert results["suites"]["held_out"]["mean_length"] == sum(lengths) / 4
        found.append(expected)
    assert len({tuple(one) for one in found}) == 4
    (note,) = results["notes"]
    assert "do_sample: True, no_repeat_ngram_size: 1, repetition_penalty: 9.0, top_k: 3" in note


def test_lm_eval_does_not_use_generation_config(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def run(model: Any, *_: Any, **__: Any) -> dict[str, Any]:
        seen.append(model.generation_config.to_diff_dict())
        return {}

    monkeypatch.setattr(evaluate, "find_tasks", lambda *_: ["task"])
    monkeypatch.setattr(evaluate, "run_lm_eval", run)
    out = str(tmp_path / "out")
    assert cli.run(["evaluate", str(model_dir), "--lm-eval-tasks", "task", "--output-dir", out]) == 0
    assert [settings.keys() - {"transformers_version"} for settings in seen] == [{"eos_token_id"}]


def ending_at(text: str, where: str) -> dict[str, Any]:
    """The keys of a run whose rollouts end at a text, by the run's section or by that of its only stage."""
    stopping = {"rollout": {"stop_strings": [text]}}
    return stopping if where == "run" else {"stages": [{"method": "grpo", **stopping}]}


@pytest.mark.parametrize("where", ["run", "stage"])
def test_evaluation_during_training_completes_as_evaluate(
    where: str, model_dir: Path, tmp_path: Path
) -> None:
    """With the stop strings of the rollouts, which the recipe gives to `uniapl evaluate` too."""
    text = "bj"
    evaluation = {"suites": str(suite(tmp_path)), "max_completion_length": LIMIT, "repetition_penalty": 1.2}
    changes = ending_at(text, where)
    values = recipe(model_dir, tmp_path / "run", max_steps=1, eval_steps=1, evaluation=evaluation, **changes)
    values["rollout"] |= {"min_p": 0.1}
    values["optim"] = {"learning_rate": 1e-12}
    result = train(values)
    path = tmp_path / "recipe.yaml"
    path.write_text((tmp_path / "run" / "config.yaml").read_text())
    final = tmp_path / "run" / "final"
    completions, results = evaluated(final, tmp_path, "--recipe", str(path))
    expected = [generated(model_dir, p, stop_strings=[text], repetition_penalty=1.2) for p in PROMPTS]
    assert completions == expected
    assert any(one.endswith(text) for one in expected)
    during = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert during["eval/held_out/mean_length"] == results["suites"]["held_out"]["mean_length"]
    assert results["settings"]["stop_strings"] == [text]
    assert result.steps == 1


@pytest.mark.parametrize("where", ["run", "stage", "evaluation"])
def test_chat_with_a_run_stops_as_the_run_does(
    where: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "bj"
    ends: dict[str, Any] = {"rollout": {"stop_strings": ["zq"]}, "evaluation": {"stop_strings": [text]}}
    changes = ends if where == "evaluation" else ending_at(text, where)
    values = recipe(model_dir, tmp_path / "run", max_steps=1, optim={"learning_rate": 1e-12}, **changes)
    train(values)
    final = tmp_path / "run" / "final"
    expected = [generated(model_dir, prompt, stop_strings=[text]) for prompt in PROMPTS]
    assert chatted(final, monkeypatch, capsys) == expected
    assert cli.run(["chat", str(final)]) == 0
    assert f"note: stop strings as in {tmp_path / 'run' / 'config.yaml'}: ['bj']" in capsys.readouterr().err
    other = [generated(model_dir, prompt, stop_strings=["zq"]) for prompt in PROMPTS]
    assert chatted(final, monkeypatch, capsys, "--stop-strings", "zq") == other
    assert expected != other


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--min-p", "1.5"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--stop-strings", "§"], "stop_strings: the tokenizer cannot write '§'"),
        (["--stop-tokens", "two"], "model.stop_tokens: 'two' is not a token"),
        (["--chat-template-path", "none.jinja"], "model.chat_template_path 'none.jinja': file not found"),
    ],
)
@pytest.mark.parametrize("verb", ["chat", "evaluate"])
def test_wrong_settings_are_refused(
    verb: str,
    flags: list[str],
    said: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    rest = ["--suites", str(suite(tmp_path)), "--rewards", "no_comma", "--output-dir", str(tmp_path / "out")]
    assert cli.run([verb, str(model_dir), *flags, *(rest if verb == "evaluate" else [])]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
