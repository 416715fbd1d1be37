"""Faults that were found in use, each with the run that showed it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, GenerationConfig

import uniapl
from support.runs import has_letter, lines, recipe, run_until, timeless, train
from support.tiny import CONFIGS, letter_rows, make_model, make_tokenizer, save_model
from uniapl.config import DataConfig
from uniapl.config.resolve import resolve
from uniapl.data.rows import read_rows
from uniapl.errors import UniAPLError
from uniapl.models.policy import Policy
from uniapl.training.checkpoint import directory as checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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


def test_a_resumed_run_takes_the_new_learning_rate(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", max_steps=2))
    changed = {"optim": {"learning_rate": 1e-7, "lr_scheduler_type": "constant"}}
    train(recipe(model_dir, tmp_path / "run", max_steps=3, resume="auto", **changed))
    assert [r["learning_rate"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [
        pytest.approx(3e-3),
        pytest.approx(1.5e-3),
        1e-7,
    ]


def test_going_back_to_an_older_checkpoint_forgets_the_later_ones(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"max_steps": 6, "save_steps": 1, "save_total_limit": 4}
    train(recipe(model_dir, run, **values))
    back = {"resume": str(checkpoint.checkpoint_path(run, 3)), "seed": 5, **values, "save_total_limit": 2}
    run_until(1, recipe(model_dir, run, **back))
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000003", "step-000004"]
    result = train(recipe(model_dir, run, **(back | {"resume": "auto"})))
    assert result.steps == 6
    assert [r["step"] for r in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_recipe_is_refused(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", method="sft"))
    with pytest.raises(uniapl.UsageError, match="was made with methods sft; the recipe has uniapl"):
        train(recipe(model_dir, tmp_path / "run", resume="auto"))
    with pytest.raises(uniapl.UsageError, match="is a model, not a checkpoint"):
        train(recipe(model_dir, tmp_path / "new", method="sft", resume=str(tmp_path / "run" / "final")))
    train(recipe(model_dir, tmp_path / "other", method="sft"))
    step = str(checkpoint.checkpoint_path(tmp_path / "run", 2))
    with pytest.raises(uniapl.UsageError, match="already holds another run"):
        train(recipe(model_dir, tmp_path / "other", method="sft", resume=step))


def test_a_second_stage_resumes_in_another_directory(model_dir: Path, tmp_path: Path) -> None:
    stages = [{"method": "sft", "max_steps": 1}, {"method": "grpo", "max_steps": 3}]
    train(recipe(model_dir, tmp_path / "one", stages=stages, save_steps=1, save_total_limit=9))
    step = str(checkpoint.checkpoint_path(tmp_path / "one", 3))
    train(recipe(model_dir, tmp_path / "two", stages=stages, save_steps=1, resume=step))
    one, two = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert two == one[3:]


def test_changed_data_and_seed_are_said(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run", max_steps=2))
    values = recipe(model_dir, tmp_path / "run", max_steps=3, resume="auto", seed=9)
    train(values, train_dataset=letter_rows(8))
    output = capsys.readouterr().out
    assert "the data has changed since the checkpoint" in output
    assert "the seed changes from 0 (the checkpoint's) to 9" in output


def test_a_failed_start_leaves_the_old_run_alone(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run"))
    bad = {"discriminator": {"model_name_or_path": "/nowhere"}, "overwrite": True}
    with pytest.raises(uniapl.UsageError, match="cannot load the discriminator '/nowhere'"):
        train(recipe(model_dir, tmp_path / "run", **bad))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_dead_reward_stops_the_run_though_it_does_not_apply_to_every_row(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [row if n % 2 else row | {"letter": None} for n, row in enumerate(letter_rows())]
    calls = 0

    def dies(completions: list[str], letter: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise TimeoutError
        return [0.0] * len(completions)

    values = recipe(model_dir, tmp_path / "run", max_steps=30, health={"max_skipped_steps": 2})
    with pytest.raises(uniapl.HealthStop, match="reward 'dies' failed on every sample: TimeoutError"):
        train(values, train_dataset=rows, reward_functions=[dies])
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["rewards/dies/error_rate"] > 0
    assert last["rewards/dies/timeout_rate"] == 0, "its own TimeoutError is an error, not our time-out"


def test_rewards_that_apply_to_no_row_are_refused(model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"letter": None} for row in letter_rows()]
    with pytest.raises(uniapl.UsageError, match="needs a column 'letter', which no row fills"):
        train(recipe(model_dir, tmp_path / "run"), train_dataset=rows)


def test_a_reward_cannot_change_the_data(model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"notes": ["a"]} for row in letter_rows(4)]
    lengths: list[int] = []

    def greedy(completions: list[str], notes: list[list[str]]) -> list[float]:
        lengths.append(max(map(len, notes)))
        for note in notes:
            note.append("b")
        return [0.0] * len(completions)

    train(recipe(model_dir, tmp_path / "run"), train_dataset=rows, reward_functions=[greedy])
    assert set(lengths) == {1}


def test_notes_of_stages_are_shown(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run", stages=[{"method": "sft", "max_steps": 1}]))
    assert "note: method 'sft' sets objective.beta = 0.0 (recipe: 0.05)" in capsys.readouterr().out


def test_weight_decay_alone_does_not_move_the_policy(model_dir: Path, tmp_path: Path) -> None:
    """gad in its discriminator's warm-up has no active component."""
    settings = {"weight_decay": 1.0, "learning_rate": 0.1}
    values = recipe(model_dir, tmp_path / "run", method="gad", optim=settings, objective={"beta": 0.0})
    train(values | {"max_steps": 1}, reward_functions=[])
    start = load_file(model_dir / "model.safetensors")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(final[name], start[name]) for name in start)


def test_two_precisions_in_one_process_and_no_kl_to_oneself_in_bf16(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "fp32", max_steps=1)
    train(values)
    changed = {"output_dir": str(tmp_path / "bf16"), "optim": {"bf16": True, "learning_rate": 1e-9}}
    result = train(values | changed)
    assert result.metrics["kl"] == 0.0, "the reference computes in the precision of the policy"


def test_accelerate_s_environment_does_not_scale_gradients(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for name, value in (("one", "1"), ("four", "4")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        norms.append(train(recipe(model_dir, tmp_path / name, max_steps=1)).metrics["grad_norm"])
    assert norms[0] == norms[1]


def test_a_soft_cap_is_found_although_a_fresh_model_s_logits_are_small() -> None:
    small = {**CONFIGS["gemma2_softcap"].to_dict(), "final_logit_softcapping": 30.0}
    from transformers import AutoModelForCausalLM

    assert not Policy(AutoModelForCausalLM.from_config(Gemma2Config(**small))).has_linear_head


def test_a_model_with_state_space_layers_is_refused_before_training(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    path = save_model(tmp_path / "model")
    small = {key: value for key, value in CONFIGS["qwen3"].to_dict().items() if key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id",
    )}  # fmt: skip
    hybrid = Lfm2Config(**small, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(hybrid).save_pretrained(path)
    with pytest.raises(uniapl.UsageError, match="layers without a key-value cache"):
        train(recipe(path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_it_runs_without_git(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    train(recipe(model_dir, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["git_commit"] is None


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
            "row 1: data.columns renames 'question' to 'prompt', which is there",
        ),
    ],
)
def test_odd_rows(row: dict[str, Any], message: str, model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run", data={"columns": {"question": "prompt"}})
    with pytest.raises(uniapl.UsageError, match=message):
        train(values, train_dataset=[row])


@pytest.mark.parametrize(
    "values", [{"method": ["sft"]}, {"seed": 2**32}, {"optim": {"learning_rate": float("inf")}}]
)
def test_odd_values(values: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError):
        train(recipe(model_dir, tmp_path / "run", **values))


def test_a_system_prompt_for_plain_text_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError, match=r"data\.system_prompt does not apply"):
        train(recipe(model_dir, tmp_path / "run", data={"system_prompt": "be brief"}))


def test_an_answer_that_reads_none_is_an_answer(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("prompt,completion,letter\na,None,a\nb,NA,b\nc,,c\n")
    values = recipe(model_dir, tmp_path / "run", max_steps=1, data={"path": str(data)})
    uniapl.train(values, reward_functions=[has_letter])
    shown = {r["row"]: r["demonstration"] for r in lines(tmp_path / "run" / "completions.jsonl")}
    assert shown == {1: "None", 2: "NA", 3: None}


def test_reward_files_find_their_neighbours_and_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom helper import VALUE\n"
        "@dataclass\nclass A:\n    x: int = 1\n"
        "def f(completions):\n    return [VALUE] * len(completions)\n"
    )
    code = (
        "from uniapl.rewards.finding import find_function as find\n"
        f"assert find({str(tmp_path / 'mine.py')!r} + ':f')(['a']) == [0.5]\n"
        "assert find('mine:f')(['a']) == [0.5]\n"
    )
    # A console script does not have the working directory on its path: -P.
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, env=os.environ)


def test_the_last_metrics_of_a_finished_run(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run", max_steps=2)
    first = train(values)
    assert train(values | {"resume": "auto"}).metrics["loss"] == first.metrics["loss"]


def test_a_model_s_head_is_checked_relative_to_its_logits() -> None:
    assert Policy(make_model("llama", scale=50.0)).has_linear_head


def test_a_checkpoint_without_discriminator_is_refused(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", objective={"lambda_adv": 0.0}))
    with pytest.raises(uniapl.UsageError, match="has no discriminator"):
        train(recipe(model_dir, tmp_path / "run", max_steps=6, resume="auto"))


def test_what_changed_since_the_last_start_is_said(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run"))
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    train(recipe(model_dir, tmp_path / "run", resume="auto", rollout={"num_generations": 2}))
    output = capsys.readouterr().out
    assert "this run is complete; to continue it, set a larger --max-steps" in output
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written
    train(recipe(model_dir, tmp_path / "run", resume="auto", max_steps=5, rollout={"num_generations": 2}))
    output = capsys.readouterr().out
    assert "changed since the run was last started: max_steps: 4 -> 5" in output
    assert "changed since the run was last started: rollout.num_generations: 4 -> 2" in output
    train(recipe(model_dir, tmp_path / "other", resume="auto", max_steps=1))
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(number: int, model_dir: Path, tmp_path: Path) -> None:
    """Stopped inside step 3 of 12, at save_steps 6: the run ends after step 3 and resumes to the same end."""
    calls = 0
    handler = signal.getsignal(number)  # a shell may have started us with SIGINT ignored

    def stopping(completions: list[str], letter: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), number)
        return has_letter(completions, letter)

    stopping.__name__ = "has_letter"
    values = {"max_steps": 12, "save_steps": 6}
    with pytest.raises(UniAPLError, match=r"continue from .*step-000003") as raised:
        train(recipe(model_dir, tmp_path / "stopped", **values), reward_functions=[stopping])
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    train(recipe(model_dir, tmp_path / "stopped", resume="auto", **values))
    train(recipe(model_dir, tmp_path / "whole", **values))
    stopped, whole = (lines(tmp_path / name / "completions.jsonl") for name in ("stopped", "whole"))
    assert stopped == whole


def test_an_empty_section_says_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(model_dir, tmp_path / "run", method="sft", max_steps=1)
    train(values | {"objective": {}})
    assert "note" not in capsys.readouterr().out


def test_a_reward_that_says_none_of_everything_is_pointed_out(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    train(recipe(model_dir, tmp_path / "run", max_steps=1), reward_functions=silent)
    assert "step 1: no rollout has a reward: every reward function returned None" in capsys.readouterr().out


def test_a_failing_reward_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine_too.py").write_text(
        "def f(completions):\n    return [c.strip() for c in completions]\n"
    )
    chat = [{"prompt": [{"role": "user", "content": "a"}]}]
    path = save_model(tmp_path / "model", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    rewards = {"functions": f"{tmp_path / 'mine_too.py'}:f"}
    values = recipe(path, tmp_path / "run", method="grpo", rewards=rewards)
    with pytest.raises(uniapl.UsageError, match=r"strip' \(mine_too.py, line 2\); .*c\[0\]\['content'\]"):
        train(values, train_dataset=chat, reward_functions=[])


def test_overwrite_needs_no_value() -> None:
    assert resolve({}, ["--overwrite", "--max-steps", "3"]).config.overwrite
    assert resolve({}, ["--overwrite"]).config.overwrite
    assert not resolve({}, ["--overwrite", "False"]).config.overwrite


def test_groups_that_are_all_equal_are_neither_good_nor_bad(model_dir: Path, tmp_path: Path) -> None:
    def constant(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    record = train(recipe(model_dir, tmp_path / "run", max_steps=1), reward_functions=[constant]).metrics
    assert record["frac_reward_zero_std"] == 1
    assert record["groups/all_good"] is None
    assert record["groups/all_bad"] is None


def test_a_file_of_another_kind_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("{}")
    with pytest.raises(uniapl.UsageError, match=r"must end in \.jsonl"):
        read_rows(DataConfig(path=str(tmp_path / "rows.txt")))
