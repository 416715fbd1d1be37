"""Flags set keys of every type; errors name the flag and use the words of the documentation."""

from pathlib import Path
from typing import Any

import pytest

from uniapl import cli
from uniapl.config.resolve import flatten, load_recipe, resolve, stages_of
from uniapl.errors import UsageError

RECIPE: dict[str, Any] = {
    "rewards": {"functions": ["no_comma"]},
    "data": {"columns": {"problem": "prompt"}},
    "stages": [{"method": "sft", "max_steps": 2}, {"method": "grpo"}],
}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--optim.bf16"], {"optim.bf16": True}),
        (["--optim.bf16", "--overwrite", "--seed", "3"], {"optim.bf16": True, "overwrite": True, "seed": 3}),
        (["--optim.bf16=false"], {"optim.bf16": False}),
        (["--batching.packing", "False"], {"batching.packing": False}),
        (["--overwrite", "True"], {"overwrite": True}),
        (["--overwrite", "true"], {"overwrite": True}),
        (["--overwrite", "false"], {}),
        (["--optim.bf16", "True", "--optim.bf16", "None"], {}),
        (["--model.trust-remote-code"], {"model.trust_remote_code": True}),
        (["--optim.learning_rate", "1e-3"], {"optim.learning_rate": 1e-3}),
        (["--objective.epsilon-high", "0.3"], {"objective.epsilon_high": 0.3}),
        (["--rewards.timeout", "null"], {"rewards.timeout": None}),
        (["--output-dir", "2024"], {"output_dir": "2024"}),
        (["--model.model-name-or-path=a=b"], {"model.model_name_or_path": "a=b"}),
        (["--report-to", "wandb", "mlflow"], {"report_to": ("wandb", "mlflow")}),
        (["--report-to", "[wandb, mlflow]"], {"report_to": ("wandb", "mlflow")}),
        (["--discriminator.accuracy-band", "0.7", "0.8"], {"discriminator.accuracy_band": (0.7, 0.8)}),
        (["--evaluation.suites", "ifeval", "a.jsonl"], {"evaluation.suites": ("ifeval", "a.jsonl")}),
        (["--data.columns.problem", "text"], {"data.columns.problem": "text"}),
        (["--data.columns.the-answer", "completion"], {"data.columns.the-answer": "completion"}),
        (["--data.columns", "{problem: text}"], {"data.columns.problem": "text"}),
        (["--data.columns", "problem", "text"], {"data.columns.problem": "text"}),
        (
            ["--data.chat_template_kwargs.enable_thinking", "false", "--data.chat_template_kwargs.n=3"],
            {"data.chat_template_kwargs.enable_thinking": False, "data.chat_template_kwargs.n": 3},
        ),
        (
            ["--data.chat_template_kwargs.enable_thinking"],
            {"data.chat_template_kwargs.enable_thinking": True},
        ),
    ],
)
def test_a_flag_sets_its_key(flags: list[str], changed: dict[str, Any]) -> None:
    before, after = flatten(resolve(RECIPE).config), flatten(resolve(RECIPE, flags).config)
    assert {key: value for key, value in after.items() if before.get(key, ...) != value} == changed


def test_flags_reach_into_lists() -> None:
    flags = ["--rewards.functions.0.weight", "3", "--stages.0.max-steps", "4", "--stages.1.optim.bf16"]
    resolved = resolve(RECIPE, flags)
    assert [(f.name, f.weight) for f in resolved.config.rewards.functions] == [("no_comma", 3.0)]
    sft, grpo = stages_of(resolved)
    assert (sft.config.max_steps, sft.config.optim.bf16) == (4, None)
    assert (grpo.config.max_steps, grpo.config.optim.bf16) == (100, True)
    named = resolve(RECIPE, ["--rewards.functions", "a.py:f", "b"]).config.rewards.functions
    assert [(f.name, f.weight) for f in named] == [("a.py:f", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(
    "words",
    [
        ["a.py:f", "{name: length, weight: 0.5, args: {max_words: 3}}"],
        ["a.py:f", '{"name": "length", "weight": 0.5, "args": {"max_words": 3}}'],
        ['["a.py:f", {"name": "length", "weight": 0.5, "args": {"max_words": 3}}]'],
    ],
)
def test_reward_functions_as_flags(words: list[str]) -> None:
    first, second = resolve(RECIPE, ["--rewards.functions", *words]).config.rewards.functions
    assert (first.name, first.weight, first.args) == ("a.py:f", 1.0, {})
    assert (second.name, second.weight, second.args) == ("length", 0.5, {"max_words": 3})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rewards.functions.0.args.max_words", "5"], {"max_words": 5}),
        (["--rewards.functions.0.args.schema", "{type: object}"], {"schema": {"type": "object"}}),
        (
            ["--rewards.functions.0.args", "max_words", "5", "min_words", "2"],
            {"max_words": 5, "min_words": 2},
        ),
        (["--rewards.functions.0.args.pattern", "####"], {"pattern": "####"}),
    ],
)
def test_arguments_of_a_reward_function_as_flags(words: list[str], expected: dict[str, Any]) -> None:
    """A number stays a number: their types are not known."""
    (function,) = resolve(RECIPE, words).config.rewards.functions
    assert function.args == expected


def test_mappings_as_flags() -> None:
    for words in (["{a: prompt, b: completion}"], ["a", "prompt", "b", "completion"]):
        assert resolve({}, ["--data.columns", *words]).config.data.columns == {
            "a": "prompt",
            "b": "completion",
        }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-steps", "four"], "--max-steps: must be an integer (got 'four')"),
        (["--max-steps", "1.5"], "--max-steps: must be an integer (got '1.5')"),
        (["--max-steps", "0"], "--max-steps: must be greater than or equal to 1 (got '0')"),
        (["--optim.learning_rate", "fast"], "--optim.learning-rate: must be a number (got 'fast')"),
        (["--optim.bf16", "maybe"], "--optim.bf16: must be true or false (got 'maybe')"),
        (["--rollout.sampler", "sglang"], "--rollout.sampler: must be 'local' or 'vllm' (got 'sglang')"),
        (["--report-to", "x"], "--report-to.0: must be 'tensorboard', 'trackio', 'wandb' or 'mlflow'"),
        (["--method", "ppo"], "unknown method 'ppo': choose one of sft"),
        (["--max-steps"], "--max-steps needs a value"),
        (["--max-steps", "3", "4"], "--max-steps takes one value (got '3 4')"),
        (["--max-steps", "--overwrite"], "--max-steps needs a value"),
        (["max-steps"], "unexpected argument 'max-steps': flags are --key value"),
        (["--overwrite", "yes please"], "--overwrite: must be true or false (got 'yes please')"),
        (["--data.columns", "problem"], "--data.columns: expected a mapping such as '{name: value}'"),
        (["--optim", "adamw"], "unknown flag '--optim'; it has no equivalent: the optimizer is AdamW"),
        (["--model", "x"], "unknown flag '--model'; did you mean '--model.model-name-or-path'?"),
        (["--lr", "1"], "unknown flag '--lr'; did you mean '--optim.learning-rate'?"),
        (
            ["--load-in-4bit"],
            "unknown flag '--load-in-4bit'; it has no equivalent: weights are not quantized",
        ),
        (["--stages", "sft"], "--stages: stages can only be set in the recipe"),
        (["--stages.2.max-steps", "3"], "--stages.2.max-steps: stages has 2 entries, counted from 0"),
        (["--stages.0.max-stps", "3"], "unknown flag '--stages.0.max-stps'; did you mean"),
        (["--rewards.functions.0.wieght", "3"], "unknown flag '--rewards.functions.0.wieght'"),
        (
            ["--resume", "auto", "--overwrite"],
            "overwrite would delete the run that resume continues: remove one of the two",
        ),
    ],
)
def test_a_wrong_flag_is_named_in_our_words(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolve(RECIPE, flags)
    assert str(raised.value).startswith(message)


def test_errors_in_the_recipe_name_its_file_and_errors_in_flags_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    for content, message in (
        ("max_step: 3\nseed: -1", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("reward: {functions: []}", "unknown key 'reward'; did you mean 'rewards'?"),
        ("method: ppo", "unknown method 'ppo'"),
        (
            "model: Qwen/Qwen3-0.6B",
            "model: must be a section with keys; did you mean 'model.model_name_or_path'?",
        ),
        ("stages: [{method: sft, max_step: 3}]", "stage 1: unknown key 'max_step'"),
    ):
        path.write_text(content)
        assert cli.run(["check", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"{path}: {message}" in said
        assert ("seed" in content) == (f"{path}: seed: must be greater than or equal to 0 (got -1)" in said)
    path.write_text("max_steps: 3")
    assert cli.run(["check", str(path), "--seed", "x"]) == 2
    assert capsys.readouterr().err == "error: --seed: must be an integer (got 'x')\n"
    assert load_recipe(path) == {"max_steps": 3}
