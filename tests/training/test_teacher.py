"""Runs with a teacher: what they learn, resume, processes, and what is refused before training."""

from pathlib import Path
from typing import Any

import pytest

from support.fake_vllm import serving
from support.processes import run_processes
from support.runs import assert_same_run, lines, recipe, run_until, timeless, train
from support.teacher_server import TeacherStandIn
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl.errors import UsageError


@pytest.fixture(scope="module")
def teacher_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the demonstrations."""
    values = recipe(model_dir, tmp_path_factory.mktemp("teacher") / "run", max_steps=40, save_steps=40)
    values |= {"method": "sft", "objective": {}, "discriminator": {}, "optim": {"learning_rate": 1e-2}}
    train(values, train_dataset=letter_rows(demonstrated=range(12)))
    return Path(values["output_dir"]) / "final"


def with_teacher(model: Path, output: Path, teacher: dict[str, Any], **changes: Any) -> dict[str, Any]:
    objective = {"teacher_kl": 0.5, "loss_type": "grpo"}
    return recipe(model, output, teacher=teacher, objective=objective, **changes)


@pytest.mark.parametrize(("top_k", "fraction"), [(0, 0.85), (8, 0.4)])
def test_opd_needs_neither_rewards_nor_demonstrations_and_approaches_the_teacher(
    model_dir: Path, teacher_dir: Path, tmp_path: Path, top_k: int, fraction: float
) -> None:
    values = {
        "method": "opd",
        "output_dir": str(tmp_path / "run"),
        "max_steps": 60,
        "model": {"model_name_or_path": str(model_dir)},
        "teacher": {"model_name_or_path": str(teacher_dir), "top_k": top_k},
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "optim": {"learning_rate": 3e-2, "lr_scheduler_type": "constant"},
        "batching": {"prompts_per_step": 12},
    }
    rows = [{"prompt": row["prompt"]} for row in letter_rows()]
    train(values, train_dataset=rows, reward_functions=[])
    losses = [record["loss/teacher"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    assert first > 1.0
    assert last < fraction * first
    # Its own copy as the teacher: nothing to learn.
    values |= {"output_dir": str(tmp_path / "same"), "max_steps": 1}
    values["teacher"] = {"model_name_or_path": str(model_dir), "top_k": top_k}
    train(values, train_dataset=rows, reward_functions=[])
    assert lines(tmp_path / "same" / "metrics.jsonl")[0]["loss/teacher"] == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module", params=[0, 5], ids=["sampled", "top-k"])
def run(
    request: pytest.FixtureRequest,
    model_dir: Path,
    teacher_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    teacher = {"model_name_or_path": str(teacher_dir), "top_k": request.param}
    train(with_teacher(model_dir, folder / "run", teacher))
    (folder / "top_k").write_text(str(request.param))
    return folder


def taught_as(run: Path, model: Path, teacher: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"model_name_or_path": str(teacher), "top_k": int((run / "top_k").read_text())}
    return with_teacher(model, output, settings, **changes)


def test_resume_is_exact(run: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    values = taught_as(run, model_dir, teacher_dir, tmp_path / "run")
    run_until(3, values)
    train(values | {"resume": "auto"})
    assert_same_run(tmp_path / "run", run / "run", 4)


@pytest.mark.parametrize("changes", [{"max_tokens_per_micro_batch": 30}, {"packing": False}])
def test_micro_batches_do_not_change_the_run(
    run: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(taught_as(run, model_dir, teacher_dir, tmp_path / "run", batching=changes))
    assert_close_runs(tmp_path / "run", run / "run")


def _train(folder: Path, values: dict[str, Any]) -> None:
    train(values)


@pytest.mark.distributed
def test_two_processes_give_the_same_run(
    run: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    values = taught_as(run, model_dir, teacher_dir, tmp_path / "run")
    assert run_processes(2, _train, tmp_path, values) == [0, 0]
    assert_close_runs(tmp_path / "run", run / "run")


def assert_close_runs(got: Path, expected: Path) -> None:
    mine, theirs = (timeless(lines(path / "metrics.jsonl")) for path in (got, expected))
    for one, other in zip(mine, theirs, strict=True):
        for name in ("loss", "loss/teacher", "reward", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_a_served_teacher_gives_the_same_run(
    run: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    with serving(TeacherStandIn(teacher_dir)) as fake:
        teacher = {"url": fake.url, "top_k": int((run / "top_k").read_text())}
        train(with_teacher(model_dir, tmp_path / "run", teacher))
    assert_close_runs(tmp_path / "run", run / "run")


def test_what_is_refused_before_training(model_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    def refused(teacher: dict[str, Any], match: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            train(with_teacher(model_dir, tmp_path / "run", teacher, **changes))

    refused({}, r"objective.teacher_kl needs a teacher: set teacher.model_name_or_path")
    other = save_model(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(other)
    refused({"model_name_or_path": str(other)}, r"'word' has id 60 there and None here")
    refused({"model_name_or_path": str(tmp_path / "nothing")}, "nothing")
    with serving(TeacherStandIn(teacher_dir)) as fake:
        refused({"url": fake.url}, "rollout.temperature is 0.7", rollout={"temperature": 0.7})
        fake.shift = 2
        refused({"url": fake.url}, "a teacher needs the policy's tokenizer")
        refused({"url": fake.url, "model_name_or_path": str(teacher_dir)}, "not both")
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_weight_is_reported(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"model_name_or_path": str(model_dir)}
    train(recipe(model_dir, tmp_path / "run", teacher=teacher, max_steps=1))
    text = " ".join("".join(capsys.readouterr()).split())
    assert "teacher.model_name_or_path has no effect: objective.teacher_kl is 0" in text
