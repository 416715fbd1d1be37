"""Whole runs on a tiny model: every method, pipelines, exact resume, learning, and what users do wrong."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import uniapl
from support import reference
from support.runs import assert_same_run, has_letter, lines, recipe, run_until, timeless, train, write_recipe
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.config.methods import METHODS
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.update.discriminator_step import discriminator_step
from uniapl.types import derive_seed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_only_its_components_act(method: str, model_dir: Path, tmp_path: Path) -> None:
    teacher: dict[str, Any] = {}
    if method == "opd":
        teacher = {"teacher": {"model_name_or_path": str(save_model(tmp_path / "teacher", seed=5))}}
    result = train(recipe(model_dir, tmp_path / "run", method=method, **teacher))
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    objective = uniapl.Config.model_validate(
        METHODS[method]["fixed"] and {"objective": METHODS[method]["fixed"]}
    )
    last = records[-1]
    assert (last["tokens/sft"] > 0) == objective.objective.learns_from_demonstrations
    rollouts = method != "sft"
    assert ("reward" in last) == rollouts
    assert (last["tokens/rl"] > 0) == rollouts
    adversary = method in ("a-sft", "a-grpo", "uniapl", "gad")
    assert (last["weight/lambda_adv"] > 0) == adversary
    assert ("discriminator/win_rate" in last) == adversary
    assert records[0]["weight/lambda_adv"] == 0, "nothing is felt of the discriminator while it warms up"
    rewarded, taught = method not in ("gad", "opd"), method == "opd"
    for record in records:
        assert math.isfinite(record["loss"])
        mu, beta = record["weight/mu"], 0.0 if method == "sft" else 0.05
        weights = {"sft": mu, "rl": (1 - mu) * rewarded, "adv": record["weight/lambda_adv"], "kl": beta}
        weights["teacher"] = float(taught)
        mixed = sum(weight * (record[f"loss/{name}"] or 0.0) for name, weight in weights.items())
        assert record["loss"] == pytest.approx(mixed, abs=1e-5), "the objective, term by term"
        assert record["skipped"] == 0
        if rollouts:
            assert record["trained/sampling_logp_difference/max"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(result.final_dir)
    AutoTokenizer.from_pretrained(result.final_dir)
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert result.steps == 4


@pytest.mark.parametrize("killed_at", [6, 8])
def test_twelve_steps_equal_six_and_six(killed_at: int, model_dir: Path, tmp_path: Path) -> None:
    """Killed at the checkpoint, and two steps after it: resumed runs equal the one that was never stopped."""
    objective = {"num_iterations": 2, "lambda_controller": "pid"}
    values = {"max_steps": 12, "save_steps": 6, "objective": objective}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(model_dir, whole, **values))
    run_until(killed_at, recipe(model_dir, broken, **values))
    assert [r["step"] for r in lines(broken / "metrics.jsonl")] == list(range(1, killed_at + 1))
    result = train(recipe(model_dir, broken, resume="auto", **values))
    assert result.steps == 12
    assert_same_run(broken, whole, 12)
    first, last = (load_file(checkpoint.checkpoint_path(whole, s) / "model.safetensors") for s in (6, 12))
    assert any(not torch.equal(first[key], last[key]) for key in first), "or equality would prove nothing"


def test_a_pipeline_resumes_in_its_second_stage(model_dir: Path, tmp_path: Path) -> None:
    values = {
        "stages": [{"method": "sft", "max_steps": 3}, {"method": "a-grpo", "max_steps": 3}],
        "save_steps": 4,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(model_dir, whole, **values))
    # The reward is first called in the second stage: its second step is the run's fifth.
    run_until(2, recipe(model_dir, broken, **values))
    train(recipe(model_dir, broken, resume="auto", **values))
    assert_same_run(broken, whole, 6)
    stages = [record["stage"] for record in lines(whole / "metrics.jsonl")]
    assert stages == [0, 0, 0, 1, 1, 1]
    sft, rl = lines(whole / "metrics.jsonl")[2], lines(whole / "metrics.jsonl")[5]
    assert (sft["tokens/rl"], rl["tokens/sft"]) == (0, 0)
    assert AutoModelForCausalLM.from_pretrained(whole / "stages" / "1")
    # kl starts at zero again: the reference of the second stage is where the first one ended.
    assert lines(whole / "metrics.jsonl")[3]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_may_be_the_policy_of_a_later_step(model_dir: Path, tmp_path: Path) -> None:
    """No KL before; none at that step, where the two are the same; and it is kept for a resumed run."""
    values = {"max_steps": 8, "save_steps": 3, "objective": {"reference_step": 4, "beta": 0.3}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(model_dir, whole, **values))
    records = lines(whole / "metrics.jsonl")
    assert [record["kl"] for record in records[:4]] == [None] * 4
    assert records[4]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(record["kl"] > 1e-4 for record in records[5:])
    for step, kept in ((3, False), (6, True)):
        assert (checkpoint.checkpoint_path(whole, step) / "reference.safetensors").exists() == kept
    run_until(7, recipe(model_dir, broken, **values))
    # What was kept holds, whatever the recipe says of it now.
    later = {"reference_step": 7, "beta": 0.3}
    train(recipe(model_dir, broken, resume="auto", **values | {"objective": later}))
    assert timeless(lines(broken / "metrics.jsonl")) == timeless(records)
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_resumes_to_itself(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run")
    first = train(values)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(values | {"resume": "auto"})
    assert again.steps == first.steps
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(model_dir, tmp_path / "run")
    train(values)
    reference = (tmp_path / "run" / "completions.jsonl").read_bytes()
    newest = checkpoint.checkpoint_path(tmp_path / "run", 4) / "policy_optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(values | {"resume": "auto"})
    output = capsys.readouterr().out
    assert "step-000004 is damaged and skipped: policy_optimizer.safetensors: contents changed" in output
    assert "resumed at step 2" in output
    assert (tmp_path / "run" / "completions.jsonl").read_bytes() == reference
    assert not checkpoint.defects(newest.parent), "the damaged one was replaced by a whole one"


def test_the_resolved_configuration_reproduces_the_run(model_dir: Path, tmp_path: Path) -> None:
    values = {"stages": [{"method": "sft", "max_steps": 1}, {"method": "chord-mu", "max_steps": 2}]}
    train(recipe(model_dir, tmp_path / "one", **values))
    again = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text()) | {
        "output_dir": str(tmp_path / "two")
    }
    train(again)
    one, two = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert one == two


def test_it_learns(model_dir: Path, tmp_path: Path) -> None:
    """From random weights: the reward rises, demonstrations are learnt, the discriminator tells apart."""
    values = recipe(
        model_dir,
        tmp_path / "run",
        max_steps=60,
        save_steps=60,
        objective={"mu_decay_steps": 60, "beta": 0.0},
        optim={"learning_rate": 5e-3},
        batching={"prompts_per_step": 4, "demonstrations_per_step": 4, "max_tokens_per_micro_batch": 4000},
    )
    train(values, train_dataset=letter_rows(4, demonstrated=(0, 2)))
    records = lines(tmp_path / "run" / "metrics.jsonl")

    def mean(key: str, part: slice) -> float:
        found = [record[key] for record in records[part]]
        return sum(found) / len(found)

    assert mean("reward", slice(-10, None)) > mean("reward", slice(0, 10)) + 0.3
    assert mean("sft/nll", slice(-10, None)) < 0.5 * mean("sft/nll", slice(0, 10))
    assert max(record["discriminator/accuracy"] for record in records) > 0.8


def test_completions_are_written_as_they_were(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run"))
    records = lines(tmp_path / "run" / "completions.jsonl")
    assert len(records) == 4 * 3
    rows = letter_rows()
    for record in records:
        row = rows[record["row"] - 1]
        assert record["prompt"] == row["prompt"]
        assert record["demonstration"] == row.get("completion")
        for completion in record["completions"]:
            assert completion["reward"] == pytest.approx(has_letter([completion["text"]], [row["letter"]])[0])
    rewards = [c["reward"] for r in records if r["step"] == 1 for c in r["completions"]]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["rewards/has_letter/mean"] == pytest.approx(metrics["reward"])


def test_a_hugging_face_dataset_and_a_config_object(model_dir: Path, tmp_path: Path) -> None:
    import datasets

    config = uniapl.Config.model_validate(recipe(model_dir, tmp_path / "run", max_steps=1))
    result = uniapl.train(
        config, train_dataset=datasets.Dataset.from_list(letter_rows()), reward_functions=has_letter
    )
    assert result.metrics["step"] == 1


def test_checkpoints_are_pruned_and_load_as_models(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", max_steps=6, save_total_limit=2))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]
    assert AutoModelForCausalLM.from_pretrained(checkpoint.checkpoint_path(tmp_path / "run", 6))


def test_a_reward_that_fails_in_the_run_is_counted_and_then_stops_it(model_dir: Path, tmp_path: Path) -> None:
    calls = 0

    def fragile(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("server is gone")
        return [0.5] * len(completions)

    values = recipe(model_dir, tmp_path / "run", max_steps=20, health={"max_skipped_steps": 3})
    with pytest.raises(
        uniapl.HealthStop, match=r"step 4: 3 steps in a row: reward 'fragile'.*server is gone"
    ):
        train(values, reward_functions=[fragile])
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["rewards/fragile/error_rate"] for record in records] == [0.0, 1.0, 1.0, 1.0]
    assert [record["tokens/rl"] > 0 for record in records] == [True, False, False, False]
    assert [record["reward"] for record in records] == [0.5, None, None, None]
    assert not checkpoint.defects(checkpoint.checkpoint_path(tmp_path / "run", 4))


def test_a_gradient_that_stays_infinite_stops_the_run(model_dir: Path, tmp_path: Path) -> None:
    # Unscaled: a division by the group's deviation would take even such rewards back to size.
    objective = {"scale_rewards": "none"}
    values = recipe(
        model_dir, tmp_path / "run", method="grpo", health={"max_skipped_steps": 2}, objective=objective
    )

    def huge(completions: list[str]) -> list[float]:
        return [1e300 * (-1) ** n for n in range(len(completions))]

    with pytest.raises(uniapl.HealthStop, match="2 steps in a row: the gradient was not finite"):
        train(values, reward_functions=[huge])
    start = load_file(Path(values["model"]["model_name_or_path"]) / "model.safetensors")
    saved = load_file(checkpoint.checkpoint_path(tmp_path / "run", 2) / "model.safetensors")
    assert all(torch.equal(saved[key], start[key]) for key in start), "nothing of it reached the weights"


NEEDS_COLUMN = "def f(completions, answer):\n    return [0.0] * len(completions)\n"
RAISES = "def f(completions):\n    raise RuntimeError('no such service')\n"


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"max_stepz": 3}, None, "unknown key 'max_stepz'; did you mean 'max_steps'?"),
        ({}, [], "no rows"),
        ({}, [{"question": "a"}], "row 1: no 'prompt' and no 'messages'"),
        (
            {},
            [{"prompt": "a", "completion": "x"}, {"prompt": "a", "completion": ""}],
            "row 2: the demonstration is",
        ),
        ({"method": "sft"}, [{"prompt": "a"}], "no row has a 'completion'"),
        ({"rewards": {}}, None, "set rewards.functions"),
        (
            {"rewards": {"functions": ["{tmp}/reward.py:f"]}, "_file": NEEDS_COLUMN},
            None,
            "needs a column 'answer'",
        ),
        (
            {"rewards": {"functions": ["{tmp}/reward.py:f"]}, "_file": RAISES},
            None,
            "RuntimeError: no such service",
        ),
        (
            {"rewards": {"functions": ["{tmp}/reward.py:f"]}, "_file": "import nowhere\n"},
            None,
            "No module named",
        ),
        ({"model": {"model_name_or_path": "/nowhere/model"}}, None, "directory not found"),
        ({"data": {"path": "nowhere.jsonl"}}, None, "file not found: 'nowhere.jsonl'"),
        ({"resume": "{tmp}/nowhere"}, None, "give a checkpoint's directory, or auto"),
        ({"discriminator": {"kind": "polar"}}, None, "'polar' needs discriminator.model_name_or_path"),
        (
            {"discriminator": {"kind": "polar", "model_name_or_path": "/nowhere"}},
            None,
            "cannot load the tokenizer '/nowhere'",
        ),
        (
            {"discriminator": {"kind": "density-ratio", "model_name_or_path": "/nowhere"}},
            None,
            "cannot load the model '/nowhere'",
        ),
        (
            {"discriminator": {"kind": "remote", "model_name_or_path": "x"}},
            None,
            "'remote' needs discriminator.url",
        ),
        (
            {"discriminator": {"kind": "remote", "model_name_or_path": "x", "url": "host:80"}},
            None,
            "expected http://host:port",
        ),
        (
            {"discriminator": {"held_out_fraction": 0.999999}},
            None,
            "leaves prompts on both sides",
        ),
        ({"discriminator": {"held_out_fraction": 1e-9}}, None, "holds out 0 of"),
        (
            {"discriminator": {"kind": "bradley-terry", "lora_r": 2, "freeze_after_steps": 2}},
            None,
            "cannot freeze adapters",
        ),
        (
            {"method": "gad", "objective": {"adversarial_placement": "reward"}},
            None,
            "set objective.adversarial_placement to loss",
        ),
        (
            {
                "objective": {
                    **{"mu_controller": "gate", "reward_weight": 0.0},
                    "adversarial_placement": "loss",
                },
                "rewards": {},
            },
            None,
            "'gate' needs rewards: set rewards.functions",
        ),
        (
            {
                "method": "chord-mu",
                "objective": {"mu_controller": "gate"},
                "rewards": {"functions": ["{tmp}/reward.py:f"]},
                "_file": NEEDS_COLUMN,
            },
            [{"prompt": "a", "answer": "a"}, {"prompt": "b", "completion": "b"}],
            "but no sampled prompt has one",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_user_errors_end_with_2_and_one_message(
    verb: str,
    changes: dict[str, Any],
    rows: list[dict[str, Any]] | None,
    message: str,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path)))
    (tmp_path / "reward.py").write_text(changes.pop("_file", ""))
    path = write_recipe(tmp_path, model_dir, rows, **changes)
    assert cli.run([verb, str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_check_prints_every_trained_turn_without_line_breaks_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    model_dir = save_model(tmp_path / "chat", chat_template=template)
    roles = ("user", "assistant", "user", "assistant")
    texts = ("hi", "a" * 60, "bye", "ciao")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    path = write_recipe(tmp_path, model_dir, [{"messages": messages}], method="sft", rewards={})
    assert cli.run(["check", str(path), "--data.train-on", "all"]) == 0
    printed = capsys.readouterr().out
    assert "row 1, trained turn 1 of 2, as the model receives it" in printed
    assert f"user hi<turn>assistant [[{'a' * 60}<turn>" in printed
    assert "[[ciao<turn>" in printed


def test_the_command_line_end_to_end(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, model_dir)
    assert cli.run(["check", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["examples"] == 12
    assert report["with_demonstration"] == 6
    assert report["rewards"] == {"lowercase": 12}
    assert report["preview"]["text"] == "say a.[[aaa<eos>]]"
    assert cli.run(["check", str(path)]) == 0
    assert "say a.[[aaa<eos>]]" in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "check leaves nothing behind"

    assert cli.run(["train", str(path), "--max-steps", "2", "--objective.lambda-adv", "0.25"]) == 0
    output = capsys.readouterr().out
    assert "2/2 reward" in output
    assert str(tmp_path / "run" / "final") in output
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["weight/lambda_adv"] == 0.25

    assert cli.run(["train", str(path)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.run(["train", str(path), "--overwrite", "True", "--max-steps", "1"]) == 0
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_an_output_that_cannot_be_written(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(uniapl.UsageError, match="cannot be written"):
        train(recipe(model_dir, tmp_path / "file" / "run"))


def test_a_tokenizer_that_is_too_large_for_its_model(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"extra{n}" for n in range(20)])
    tokenizer.save_pretrained(path)
    with pytest.raises(uniapl.UsageError, match="use the tokenizer that belongs to the model"):
        train(recipe(path, tmp_path / "run"))


def test_bf16_autocast(model_dir: Path, tmp_path: Path) -> None:
    """As on a GPU: weights stay fp32, sampler and trainer compute alike in bf16. In a process of its own."""
    path = write_recipe(tmp_path, model_dir)
    command = [sys.executable, "-m", "uniapl.cli", "train", str(path), "--optim.bf16", "True"]
    subprocess.run(command, check=True, capture_output=True)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4
    for record in records:
        assert record["skipped"] == 0
        assert 0 < record["trained/sampling_logp_difference/mean"] < 0.02
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "adapters",
    [{}, {"model.lora_r": 4, "discriminator.lora_r": 2, "optim.gradient_checkpointing": True}],
    ids=["whole models", "adapters"],
)
def test_a_run_on_two_processes_equals_one_on_one(
    adapters: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    """Rollouts, rewards and both models' updates are shared out; 3 prompts do not divide by 2 processes."""
    objective = {"lambda_controller": "dual", "beta": 0.05, "mu_decay_steps": 4, "reference_step": 2}
    changes = {"objective": objective, "log_gradients_steps": 2, **adapters}
    path = write_recipe(tmp_path, model_dir, **changes)
    arguments = ["-m", "uniapl.cli", "train", str(path), "--output-dir"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *rendezvous]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for start, output in (([], "one"), (launcher, "two")):
        command = [sys.executable, *start, *arguments, str(tmp_path / output)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    one, two = (timeless(lines(tmp_path / output / "metrics.jsonl")) for output in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            close = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert other[key] == close, key
    one, two = (lines(tmp_path / output / "completions.jsonl") for output in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert [c["text"] for c in mine["completions"]] == [c["text"] for c in other["completions"]]
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    saved, other = (load_file(tmp_path / output / "final" / name) for output in ("one", "two"))
    for name, tensor in saved.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


def test_verbs_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    assert cli.run(["--help"]) == 0
    assert "uniapl VERB" in capsys.readouterr().out
    assert cli.run(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert cli.run(["train"]) == 2
    assert "needs a recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit), contextlib.suppress(KeyboardInterrupt):
        cli.main(["--help"])


def test_a_second_update_on_the_same_rollouts_is_off_policy(model_dir: Path, tmp_path: Path) -> None:
    """The ratio is taken against the first update's policy, so that a large step runs into the clip."""
    settings = {"objective": {"beta": 0.0}, "optim": {"learning_rate": 0.05}, "max_steps": 1}
    once = train(recipe(model_dir, tmp_path / "once", method="grpo", **settings)).metrics
    settings["objective"] = {"beta": 0.0, "num_iterations": 2}
    twice = train(recipe(model_dir, tmp_path / "twice", method="grpo", **settings)).metrics
    assert once["clip_ratio/low_mean"] + once["clip_ratio/high_mean"] == 0
    assert twice["clip_ratio/low_mean"] + twice["clip_ratio/high_mean"] > 0


def test_the_same_prompt_is_answered_anew_in_every_step(model_dir: Path, tmp_path: Path) -> None:
    """Weights that hardly move: only the step's own seed can make the answers differ."""
    values = recipe(model_dir, tmp_path / "run", method="grpo", optim={"learning_rate": 1e-12})
    train(values | {"max_steps": 2}, train_dataset=letter_rows(1))
    first, _, _, second, *_ = lines(tmp_path / "run" / "completions.jsonl")
    assert first["row"] == second["row"]
    assert [c["text"] for c in first["completions"]] != [c["text"] for c in second["completions"]]


def test_in_the_reward_the_adversary_has_no_term_of_its_own(model_dir: Path, tmp_path: Path) -> None:
    objective = {"beta": 0.0, "adversarial_placement": "reward", "scale_rewards": "none"}
    train(recipe(model_dir, tmp_path / "run", method="a-grpo", objective=objective))
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["weight/lambda_adv"] for record in records] == [0.0, 2.0, 2.0, 2.0]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss/rl"], abs=1e-6), "mu is 0: nothing else acts"
    for line in lines(tmp_path / "run" / "completions.jsonl"):
        group = line["completions"]
        bonus = 0.0 if line["step"] == 1 else 2.0
        rewards_mean = sum(c["reward"] for c in group) / len(group)
        known = all(c["win_rate"] is not None for c in group)
        wins_mean = sum(c["win_rate"] for c in group) / len(group) if known else 0.0
        for c in group:
            extra = bonus * (c["win_rate"] - wins_mean) if known else 0.0
            assert c["advantage"] == pytest.approx(c["reward"] - rewards_mean + extra, abs=1e-9)


def test_a_frozen_discriminator_learns_no_more(model_dir: Path, tmp_path: Path) -> None:
    settings = {"discriminator": {"freeze_after_steps": 2, "accuracy_band": (1.0, 1.0)}}
    train(recipe(model_dir, tmp_path / "run", method="a-grpo", save_steps=1, save_total_limit=4, **settings))
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["discriminator/updates"] for record in records[1:]] == [2, 0, 0]
    weights = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "discriminator.safetensors")
        for step in (1, 2, 4)
    ]
    assert all(weights[1][name].equal(weights[2][name]) for name in weights[1])
    assert not all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    stages = [{"method": "sft", "max_steps": 2}, {"method": "a-grpo", "max_steps": 4}]
    train(recipe(model_dir, tmp_path / "later", stages=stages, **settings))
    records = lines(tmp_path / "later" / "metrics.jsonl")[2:]
    updates = [record["discriminator/updates"] for record in records]
    assert updates[1:] == [2, 0, 0], "counted in the stage's steps"


def test_an_evaluation_is_logged_and_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    def look(step: int, model: PreTrainedModel) -> dict[str, Any]:
        return {"norm": model.get_input_embeddings().weight.norm().detach()} if step % 2 == 0 else {}

    train(recipe(model_dir, tmp_path / "looked"), evaluate=look)
    train(recipe(model_dir, tmp_path / "blind"))
    looked, blind = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("looked", "blind"))
    norms = [record.pop("eval/norm", None) for record in looked]
    assert looked == blind
    assert norms[0] is norms[2] is None
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "looked" / "final")
    assert norms[3] == pytest.approx(final.get_input_embeddings().weight.norm().item())
    assert norms[1] != norms[3]


@pytest.mark.parametrize(("min_accuracy", "felt"), [(0.0, 0.5), (1.0, 0.0)])
def test_a_discriminator_that_guesses_is_not_felt(
    min_accuracy: float, felt: float, model_dir: Path, tmp_path: Path
) -> None:
    settings = {"discriminator": {"min_accuracy": min_accuracy}, "objective": {"lambda_adv": 0.5}}
    train(recipe(model_dir, tmp_path / "run", method="a-grpo", **settings))
    weights = [record["weight/lambda_adv"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert weights == [0.0, felt, felt, felt]


def test_an_adversary_that_is_the_only_force_is_felt_in_any_case(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", method="gad", discriminator={"min_accuracy": 1.0}))
    weights = [record["weight/lambda_adv"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert weights == [0.0, 1.0, 1.0, 1.0]


def test_mu_answers_to_the_rewards(model_dir: Path, tmp_path: Path) -> None:
    """Recomputed from the completions that the runs wrote; the threshold lies among the rewards."""
    settings = {"mu_threshold": 0.3, "mu_peak": 0.29, "mu_valley": 0.25, "gate_threshold": 0.0}
    for controller in ("reward", "gate"):
        run = tmp_path / controller
        train(recipe(model_dir, run, max_steps=6, objective={"mu_controller": controller, **settings}))
        completions = lines(run / "completions.jsonl")
        mus: list[float] = []
        for record in lines(run / "metrics.jsonl"):
            prompts = [line for line in completions if line["step"] == record["step"]]
            failed = [
                line
                for line in prompts
                if line["demonstration"] and not any(c["reward"] for c in line["completions"])
            ]
            rewards = [c["reward"] for line in prompts for c in line["completions"]]
            if controller == "reward":
                mus.append(min(0.29, max(0.25, 0.3 - sum(rewards) / len(rewards))))
                assert record["tokens/sft"] > 0
            else:
                mus.append(len(failed) / len(prompts))
                passed = [line for line in prompts if line not in failed]
                learnt = sum(c["tokens"] for line in passed for c in line["completions"])
                assert record["tokens/rl"] == learnt, "each prompt is trained by one of the two"
                # The letters and the end token.
                assert record["tokens/sft"] == sum(len(line["demonstration"]) + 1 for line in failed)
            assert record["weight/mu"] == pytest.approx(mus[-1])
        assert len(set(mus)) > 1, "or the rewards moved nothing"


def test_measuring_the_gradients_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "measured", log_gradients_steps=2))
    train(recipe(model_dir, tmp_path / "plain"))
    measured, plain = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("measured", "plain"))
    gradients = [
        {k: r.pop(k) for k in list(r) if k.startswith(("grad_norm/", "grad_cosine/"))} for r in measured
    ]
    assert measured == plain
    norms = [{k for k in found if k.startswith("grad_norm")} for found in gradients]
    both, all_three = {"grad_norm/sft", "grad_norm/rl"}, {"grad_norm/sft", "grad_norm/rl", "grad_norm/adv"}
    assert norms == [both, set(), all_three, set()], "the adversary is warm from the second step on"
    assert -1 < gradients[0]["grad_cosine/sft_rl"] < 1


@pytest.mark.parametrize(("controller", "expected"), [("fixed", 4.0), ("dual", 2.0)])
def test_a_fixed_lambda_is_the_recipe_s_a_learned_one_the_run_s(
    controller: str, expected: float, model_dir: Path, tmp_path: Path
) -> None:
    """Resumed with another lambda_adv; a learned one that hardly moves shows which of the two goes on."""
    objective = {"lambda_controller": controller, "lambda_learning_rate": 1e-6}
    for value, resume in ((2.0, "never"), (4.0, "auto")):
        changes = {"objective": {"lambda_adv": value, **objective}, "max_steps": int(value)}
        train(recipe(model_dir, tmp_path / "run", method="a-grpo", resume=resume, **changes))
    weights = [record["weight/lambda_adv"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert weights == pytest.approx([0.0, 2.0, expected, expected], rel=1e-4)


def test_held_out_demonstrations_are_looked_at_and_never_learned_from(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[int] = []
    original = discriminator_step

    def watched(*arguments: Any, **settings: Any) -> tuple[float, bool]:
        learned.append(len(arguments[-1]))
        return original(*arguments, **settings)

    monkeypatch.setattr("uniapl.training.adversary.discriminator_step", watched)
    settings = {"held_out_fraction": 0.4, "replay_fraction": 0.0, "updates_per_step": 1}
    changes = {"discriminator": settings, "batching": {"prompts_per_step": 8}}
    train(recipe(model_dir, tmp_path / "run", method="a-grpo", max_steps=6, **changes))
    completions = lines(tmp_path / "run" / "completions.jsonl")
    encode = make_tokenizer().encode
    split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for line in completions:
        if line["demonstration"]:
            drawn = derive_seed(0, "held out", *encode(line["prompt"]))
            split[drawn < 0.4 * 2**63].append(line)
    assert sum(learned) == len(split[False]) > 0
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        wins = [c["win_rate"] for x in split[True] if x["step"] == record["step"] for c in x["completions"]]
        expected = pytest.approx(sum(wins) / len(wins)) if wins else None
        assert record.get("discriminator/held_out_pair_win_rate") == expected
    accuracy = {"discriminator/held_out_accuracy": 0.5, "discriminator/accuracy": 0.5}
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        for name in accuracy:
            seen = record.get(name)
            accuracy[name] += 0.1 * (seen - accuracy[name]) if seen is not None else 0.0
    held_out, of_all = accuracy.values()
    state = json.loads((checkpoint.checkpoint_path(tmp_path / "run", 6) / "state.json").read_text())
    assert state["adversary"]["accuracy"] == pytest.approx(held_out), "the band looks at the held-out pairs"
    assert held_out != pytest.approx(of_all)
    assert split[True]


def test_a_learned_lambda_answers_to_the_pairs(model_dir: Path, tmp_path: Path) -> None:
    """Recomputed from what the run wrote: not before the warm-up, then by dual ascent, and in force."""
    learned = {"lambda_controller": "dual", "max_expert_gap": 0.01, "lambda_learning_rate": 3.0}
    changes = {"objective": {"lambda_adv": 0.5, **learned}}
    train(recipe(model_dir, tmp_path / "run", method="a-grpo", max_steps=6, **changes))
    records = lines(tmp_path / "run" / "metrics.jsonl")
    value = 0.5
    for record in records:
        win_rate = record.get("discriminator/pair_win_rate")
        if win_rate is None:
            assert "constraint/multiplier" not in record
        else:
            violation = 0.5 - win_rate - 0.01
            value *= math.exp(3.0 * violation) if record["step"] > 1 else 1
            assert record["constraint/violation"] == pytest.approx(violation)
            assert record["constraint/multiplier"] == pytest.approx(value)
        assert record["weight/lambda_adv"] == pytest.approx(value if record["step"] > 1 else 0.0)
    assert value != 0.5


def test_settings_of_the_rollouts_loss_reach_the_update(model_dir: Path, tmp_path: Path) -> None:
    """Recomputed from what the run wrote: counts without truncated completions, advantages, metrics."""
    objective = {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "mask_truncated_completions": True,
        "entropy_coef": 0.5,
        "multi_objective_aggregation": "normalize_then_sum",
        "num_iterations": 2,
        "beta": 0.1,
    }

    def length(completions: list[str]) -> list[float]:
        return [100.0 * len(text) for text in completions]

    values = recipe(model_dir, tmp_path / "run", method="grpo", max_steps=3, objective=objective)
    train(values, reward_functions=[has_letter, length])
    completions = lines(tmp_path / "run" / "completions.jsonl")
    truncated = 0
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        here = [line["completions"] for line in completions if line["step"] == record["step"]]
        every = [c for group in here for c in group]
        kept = [c for c in every if c["finish_reason"] == "stop"]
        truncated += len(every) - len(kept)
        assert record["tokens/rollout"] == sum(c["tokens"] for c in every)
        assert record["tokens/rl"] == sum(c["tokens"] for c in kept)
        assert not record["skipped"]
        parts = [[[c["rewards"][name] for c in group] for group in here] for name in here[0][0]["rewards"]]
        expected = reference.decoupled_advantages(parts, [1.0, 1.0])
        got = [[c["advantage"] for c in group] for group in here]
        assert got == [pytest.approx(values, abs=1e-6) for values in expected]
    assert truncated


def test_rollout_tokens_are_counted(model_dir: Path, tmp_path: Path) -> None:
    def half_known(completions: list[str]) -> list[float | None]:
        return [None if n % 2 else 1.0 for n in range(len(completions))]

    train(recipe(model_dir, tmp_path / "run", method="uniapl"), reward_functions=[half_known])
    completions = lines(tmp_path / "run" / "completions.jsonl")
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        here = [c for line in completions if line["step"] == record["step"] for c in line["completions"]]
        assert record["tokens/rollout"] == sum(c["tokens"] for c in here), (
            "whether its reward is known or not"
        )
        assert record["tokens/rl"] == sum(c["tokens"] for c in here if c["reward"] is not None)
