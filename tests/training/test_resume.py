"""Resuming a run: from which checkpoint, with which recipe, and what is refused."""

import json
from pathlib import Path

import pytest

import uniapl
from support.runs import lines, recipe, run_until, timeless, train
from support.tiny import letter_rows
from uniapl.config import Config, DataConfig
from uniapl.data.rows import tokenize_rows
from uniapl.data.streams import is_held_out
from uniapl.models.loading import ModelSource, load_tokenizer
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.state import read_state


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


def test_held_out_demonstrations_stay_held_out_under_another_seed(model_dir: Path, tmp_path: Path) -> None:
    """The discriminator is compared with a run on fewer rows: its updates never contain a held-out prompt."""
    rows = letter_rows(demonstrated=range(12))
    tokenizer = load_tokenizer(ModelSource(base=str(model_dir)))
    examples = tokenize_rows(list(enumerate(rows, start=1)), tokenizer, DataConfig()).examples
    settings = {"held_out_fraction": 0.4, "replay_size": 100}
    drawn = [
        [is_held_out(e, Config.model_validate({"seed": seed, "discriminator": settings})) for e in examples]
        for seed in range(20)
    ]
    assert all(one == drawn[0] for one in drawn)
    assert 0 < sum(drawn[0]) < len(rows)
    values = recipe(model_dir, tmp_path / "run", discriminator=settings, save_steps=1)
    train(values | {"max_steps": 2}, train_dataset=rows)
    train(values | {"seed": 7, "resume": "auto"}, train_dataset=rows)
    held_out = {e.prompt_ids for e, out in zip(examples, drawn[0], strict=True) if out}
    state = read_state(checkpoint.checkpoint_path(tmp_path / "run", 4))
    replayed = {tuple(item["prompt_ids"]) for item in state["replay"]}
    assert len(replayed) > 3
    assert not replayed & held_out


def test_a_failed_start_leaves_the_old_run_alone(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run"))
    bad = {"discriminator": {"model_name_or_path": "/nowhere"}, "overwrite": True}
    with pytest.raises(uniapl.UsageError, match="cannot load the discriminator '/nowhere'"):
        train(recipe(model_dir, tmp_path / "run", **bad))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


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


@pytest.mark.parametrize("wrong", [[1.0], [-1.0, 2.0], [1.0, 2.0, 3.0], [1e300, 0.0], "often"])
def test_pass_rates_of_another_form_are_refused(wrong: object, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(recipe(model_dir, path, max_steps=2, batching={"prompt_selection": "informative"}))
    saved = checkpoint.checkpoint_path(path, 2)
    state = read_state(saved)
    state["pass_rates"]["0" * 16] = wrong
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(uniapl.UsageError, match=r"state.json is invalid \(pass_rates.0000000000000000"):
        read_state(saved)


def test_a_state_without_pass_rates_is_read(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    values = recipe(model_dir, path, max_steps=2, batching={"prompt_selection": "informative"})
    train(values)
    saved = checkpoint.checkpoint_path(path, 2)
    state = read_state(saved)
    del state["pass_rates"], state["stage_rollouts"]
    (saved / "state.json").write_text(json.dumps(state))
    assert {"pass_rates", "stage_rollouts"} & read_state(saved).keys() == set()
