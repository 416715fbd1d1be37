"""What a run survives: too little memory, a full disk, numbers that are none, signals, a second run."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uniapl
from support.runs import launcher, lines, recipe, run_until, timeless, train, write_recipe
from support.tiny import letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.discriminator.bradley_terry import ScoreModel
from uniapl.errors import UniAPLError
from uniapl.models.policy import Policy
from uniapl.models.reference import Reference
from uniapl.training import step_health as watch
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.disk import exclusive, format_bytes
from uniapl.types import packed_tokens

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
Usage = namedtuple("Usage", "free")


def with_little_memory(
    monkeypatch: pytest.MonkeyPatch, module: type[torch.nn.Module], limit: int
) -> list[int]:
    """Forward passes with gradients fail above `limit` tokens; their sizes are returned."""
    sizes: list[int] = []
    forward: Callable[..., Any] = module.forward

    def small(self: Any, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            spans = next((value for value in args[::-1] if isinstance(value, tuple)), ())
            sizes.append(packed_tokens(spans) if spans else input_ids.numel())
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError(FULL)
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(module, "forward", small)
    return sizes


def assert_close_runs(got: Path, expected: Path) -> None:
    one, two = (timeless(lines(run / "metrics.jsonl")) for run in (got, expected))
    for mine, other in zip(one, two, strict=True):
        for key, value in other.items():
            assert mine[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (got, expected))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-3)


def test_an_update_that_does_not_fit_is_done_in_smaller_parts(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is the same, what fitted is remembered, and a resumed run begins with it."""
    values = {
        "objective": {"num_iterations": 2},
        "batching": {"max_tokens_per_micro_batch": 1000},
        "log_gradients_steps": 1,
        "save_steps": 1,
    }
    train(recipe(model_dir, tmp_path / "whole", **values))
    sizes = with_little_memory(monkeypatch, Policy, 70)
    run_until(2, recipe(model_dir, tmp_path / "small", **values))
    assert "step 1: out of memory: from now on, micro-batches have at most" in capsys.readouterr().out
    failed = [format_bytes for format_bytes in sizes if format_bytes > 70]
    assert 1 <= len(failed) <= 6
    state = json.loads((checkpoint.checkpoint_path(tmp_path / "small", 2) / "state.json").read_text())
    assert state["token_limit"] == max(failed[-1] // 2, 1) <= 100
    sizes.clear()
    train(recipe(model_dir, tmp_path / "small", resume="auto", **values))
    assert sizes
    assert max(sizes) <= state["token_limit"]
    assert_close_runs(tmp_path / "small", tmp_path / "whole")


def test_a_second_update_that_does_not_fit_keeps_its_old_logprobs(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out between the updates of a step: each row keeps its own old log-probabilities."""
    values = {
        "objective": {"num_iterations": 2},
        "batching": {"max_tokens_per_micro_batch": 1000},
        "max_steps": 2,
    }
    train(recipe(model_dir, tmp_path / "whole", **values))
    forward, calls = Policy.forward, 0

    def second_fails(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls == 2:
            raise torch.OutOfMemoryError(FULL)
        return forward(self, *args, **options)

    monkeypatch.setattr(Policy, "forward", second_fails)
    train(recipe(model_dir, tmp_path / "small", **values))
    assert calls > 4
    assert_close_runs(tmp_path / "small", tmp_path / "whole")


def test_the_batch_that_does_not_fit_need_not_be_the_one_with_most_tokens(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long demonstration fits by itself, three short rows do not: they are parted, not the run ended."""
    rows = [row | ({"completion": "a" * 60} if row.get("completion") else {}) for row in letter_rows(12)]
    values = {"batching": {"max_tokens_per_micro_batch": 62}, "max_steps": 2}
    train(recipe(model_dir, tmp_path / "whole", **values), train_dataset=rows)
    forward, sizes = Policy.forward, list[tuple[int, int]]()

    def few_rows(self: Any, input_ids: Any, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append((len(input_ids), input_ids.numel()))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError(FULL)
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(Policy, "forward", few_rows)
    train(recipe(model_dir, tmp_path / "small", **values), train_dataset=rows)
    assert max(tokens for count, tokens in sizes if count == 1) > 62
    assert_close_runs(tmp_path / "small", tmp_path / "whole")


def test_a_discriminator_s_update_that_does_not_fit(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"batching": {"max_tokens_per_micro_batch": 1000}}
    train(recipe(model_dir, tmp_path / "whole", **values))
    sizes = with_little_memory(monkeypatch, ScoreModel, 40)
    train(recipe(model_dir, tmp_path / "small", **values))
    assert max(sizes) > 40
    assert max(sizes[-8:]) <= 40, "it tried, and then knew"
    assert_close_runs(tmp_path / "small", tmp_path / "whole")


@pytest.mark.parametrize("most", [1, 5])
def test_completions_that_the_reference_cannot_read_at_once_are_read_in_parts(
    most: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"batching": {"max_tokens_per_micro_batch": 1000}, "max_steps": 2}
    train(recipe(model_dir, tmp_path / "whole", **values))
    forward, sizes = Reference.forward, list[int]()

    def few_rows(self: Any, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError(FULL)
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(Reference, "forward", few_rows)
    train(recipe(model_dir, tmp_path / "small", **values))
    assert max(sizes) > 5
    assert_close_runs(tmp_path / "small", tmp_path / "whole")


def test_a_completion_that_the_reference_cannot_read_ends_the_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(Reference, "forward", full)
    with pytest.raises(UniAPLError, match="out of memory: the KL reference cannot read one completion of"):
        train(recipe(model_dir, tmp_path / "run"))


@pytest.mark.parametrize(("module", "said"), [(Policy, "one row of"), (ScoreModel, "a pair of")])
def test_what_fits_in_no_part_ends_the_run(
    module: type[torch.nn.Module],
    said: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_little_memory(monkeypatch, module, 3)
    with pytest.raises(UniAPLError, match=f"out of memory in the .*update: {said}.*lower rollout") as stopped:
        train(recipe(model_dir, tmp_path / "run"))
    assert stopped.value.exit_code == 1
    assert json.loads((tmp_path / "run" / "ending.json").read_text())["state"] == "stopped"


def test_an_error_that_is_not_about_memory_is_not_hidden(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Policy, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(recipe(model_dir, tmp_path / "run", method="sft"))


@pytest.mark.parametrize(
    ("phase", "target", "remedy"),
    [
        ("rollout", "uniapl.training.rollouts.sample", "rollout.max_batch_size"),
        ("score", "uniapl.training.loop.score_with_discriminator", "batching.max_tokens_per_micro_batch"),
    ],
)
def test_too_little_memory_elsewhere_names_what_to_lower(
    phase: str, target: str, remedy: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(target, full)
    with pytest.raises(UniAPLError, match=rf"out of memory \({phase}\).*{remedy}"):
        train(recipe(model_dir, tmp_path / "run"))


def test_two_runs_never_share_a_directory(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run", max_steps=1)
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(uniapl.UsageError, match="another run is using output_dir"),
    ):
        train(values)
    train(values)


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("uniapl.training.checkpoint.disk.FileLock.acquire", unsupported)
    with exclusive(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_refusal_is_told_also_where_nothing_can_be_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "unlink", read_only)
    with pytest.raises(uniapl.UsageError, match="the reason"), exclusive(tmp_path / "run"):
        raise uniapl.UsageError("the reason")


def test_a_run_that_does_not_fit_on_the_disk_is_not_begun(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=2**20 + 1000))
    with pytest.raises(uniapl.UsageError, match=r"has 1\.0 MiB free, but the run needs about .* KiB"):
        train(recipe(model_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_run_needs_room_for_its_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    """What is asked for beforehand is what the run then takes: limit + 1 checkpoints and the result."""
    asked: list[int] = []

    def remember(_: Path, needed: int) -> None:
        asked.append(needed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uniapl.training.checkpoint.disk.check_space", remember)
        train(recipe(model_dir, tmp_path / "run", save_total_limit=1, objective={"reference_step": 1}))
    one = checkpoint.checkpoint_path(tmp_path / "run", 4)
    small = sum(f.stat().st_size for f in one.iterdir() if f.suffix == ".json")
    taken, result = (
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in (one, tmp_path / "run" / "final")
    )
    assert asked[0] == pytest.approx(2 * (taken - small) + result - small, rel=0.15)


def test_older_checkpoints_make_room_and_then_the_run_ends(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest is never given up: the run ends rather than that."""
    there: list[list[int]] = []

    def room_for_two(run_dir: Path) -> Usage:
        there.append([checkpoint.step_of(path) for path in checkpoint.checkpoints(run_dir)])
        return Usage(free=0 if len(there[-1]) == 2 or 4 in there[-1] else 10**9)

    monkeypatch.setattr("uniapl.training.checkpoint.disk.shutil.disk_usage", room_for_two)
    values = recipe(model_dir, tmp_path / "run", max_steps=6, save_steps=1)
    with pytest.raises(UniAPLError, match=r"no room for the next checkpoint: .* --resume auto"):
        train(values)
    assert [2] in there, "step 1 went to make room for step 3"
    (left,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.step_of(left) == 4
    assert not checkpoint.defects(left)


def test_a_model_that_is_not_finite_stops_with_the_batch_s_path(model_dir: Path, tmp_path: Path) -> None:
    """NaN in the weights: sampler, loss and gradient; nothing is learnt, nothing raises, and one can look."""
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    values = recipe(broken, tmp_path / "run", health={"max_skipped_steps": 2})
    with pytest.raises(uniapl.HealthStop, match=r"2 steps in a row: the gradient.*skipped/step-000002\.json"):
        train(values)
    saved = json.loads((tmp_path / "run" / "skipped" / "step-000002.json").read_text())
    assert {part for row in saved["rows"] for part in row["components"]} >= {"sft", "rl"}
    demonstration = next(row for row in saved["rows"] if row["components"] == ["sft"])
    letter = demonstration["prompt"][len("say ")]
    assert demonstration["completion"] == letter * 3 + "<eos>"
    assert [record["skipped"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 1]


def test_only_the_newest_skipped_batches_are_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of steps that a resumed run does again are gone."""

    def huge(completions: list[str], letter: list[str]) -> list[float]:
        return [1e300 * (-1) ** n for n in range(len(completions))]

    monkeypatch.setattr(watch, "KEPT_BATCHES", 2)
    unscaled = {"scale_rewards": "none"}
    values = recipe(model_dir, tmp_path / "run", method="grpo", objective=unscaled, max_steps=4)
    train(values, reward_functions=[huge])
    kept = sorted(path.name for path in (tmp_path / "run" / "skipped").iterdir())
    assert kept == ["step-000003.json", "step-000004.json"]
    shutil.rmtree(checkpoint.checkpoint_path(tmp_path / "run", 4))
    train(values | {"resume": "auto"})
    assert not list((tmp_path / "run" / "skipped").iterdir())


def test_a_discriminator_without_finite_answers_stops_the_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown credit is no credit; a dead discriminator is not carried along in silence."""

    def nothing(_: Any, candidates: list[Any]) -> list[float]:
        return [float("nan")] * len(candidates)

    monkeypatch.setattr("uniapl.discriminator.bradley_terry.BradleyTerryDiscriminator.score", nothing)
    values = recipe(model_dir, tmp_path / "run", health={"max_skipped_steps": 3}, max_steps=6)
    with pytest.raises(uniapl.HealthStop, match="3 steps in a row: the discriminator had no finite logit"):
        train(values)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["tokens/adv"] for record in records] == [0, 0, 0]
    assert [record["skipped"] for record in records] == [0, 0, 0]


def test_a_discriminator_whose_gradient_is_not_finite_stops_the_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward: Callable[..., Any] = ScoreModel.forward

    def poisoned(self: Any, *args: Any) -> Any:
        logits = forward(self, *args)
        return logits * float("inf") if torch.is_grad_enabled() else logits

    monkeypatch.setattr(ScoreModel, "forward", poisoned)
    values = recipe(model_dir, tmp_path / "run", health={"max_skipped_steps": 2}, max_steps=6)
    with pytest.raises(uniapl.HealthStop, match="2 steps in a row: the discriminator's gradient"):
        train(values)
    saved = load_file(checkpoint.checkpoint_path(tmp_path / "run", 2) / "discriminator.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_save_that_cannot_be_read_back_is_no_checkpoint(tmp_path: Path) -> None:
    def half(directory: Path) -> None:
        save_file({"a": torch.ones(100)}, directory / "model.safetensors")
        whole = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        checkpoint.write_directory(tmp_path / "step-000001", half)
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
@pytest.mark.parametrize("profile", ["multi_gpu", "fsdp2"])
def test_a_signal_stops_all_processes_at_the_same_step(profile: str, model_dir: Path, tmp_path: Path) -> None:
    """Two processes: the checkpoint is that of the last step written, and the run goes on."""
    path = write_recipe(tmp_path, model_dir, max_steps=400, save_steps=400)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher(profile, 2), "-m", "uniapl.cli", "train", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    last = lines(metrics)[-1]["step"]
    assert last < 400
    assert not checkpoint.defects(checkpoint.checkpoint_path(tmp_path / "run", last)), said
    # One process goes on with what two have begun.
    steps = str(last + 2)
    assert cli.run(["train", str(path), "--resume", "auto", "--max-steps", steps]) == 0
    assert [record["step"] for record in lines(metrics)] == list(range(1, last + 3))


def test_a_clock_that_jumps_back_changes_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times come from the monotonic clock, seeds and names from no clock at all."""
    train(recipe(model_dir, tmp_path / "whole"))
    now = [2e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    train(recipe(model_dir, tmp_path / "back"))
    whole, jumped = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "back"))
    assert timeless(jumped) == timeless(whole)
    assert all(record["step_time"] > 0 for record in jumped)


def test_a_pad_token_that_is_the_end_token(tmp_path: Path) -> None:
    """Masks come from lengths: the end of an answer is learnt although padding looks the same."""
    runs: list[list[dict[str, Any]]] = []
    for name in ("<pad>", "<eos>"):
        path = save_model(tmp_path / name)
        tokenizer = make_tokenizer()
        tokenizer.pad_token = name
        tokenizer.save_pretrained(path)
        train(recipe(path, tmp_path / f"run-{name}"))
        runs.append(timeless(lines(tmp_path / f"run-{name}" / "metrics.jsonl")))
    for one, other in zip(*runs, strict=True):
        for key, value in one.items():
            assert other[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key


def test_duplicate_rows_are_rows(model_dir: Path, tmp_path: Path) -> None:
    """The same prompt twice in a step is sampled twice, each time with its own seed."""
    row = {"prompt": "say a.", "letter": "a", "completion": "aaa"}
    values = recipe(model_dir, tmp_path / "run", max_steps=1, batching={"prompts_per_step": 2})
    train(values, train_dataset=[row] * 3)
    first, second = lines(tmp_path / "run" / "completions.jsonl")
    assert first["row"] != second["row"]
    assert [c["text"] for c in first["completions"]] != [c["text"] for c in second["completions"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_half_precision_is_trained_in_fp32(
    dtype: torch.dtype, model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "half")
    weights = load_file(model_dir / "model.safetensors")
    half = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(half, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    train(recipe(tmp_path / "half", tmp_path / "run", max_steps=1))
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_sizes_for_people() -> None:
    assert [format_bytes(0), format_bytes(2**20), format_bytes(5 * 2**30)] == [
        "0.0 KiB",
        "1.0 MiB",
        "5.0 GiB",
    ]
