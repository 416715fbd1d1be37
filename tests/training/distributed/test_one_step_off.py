"""Rollouts sampled one step early: their weights, overlap with training, checkpoints, a lost server."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import uniapl
from support.fake_vllm import FakeServer, behind, serving
from support.runs import evaluated, lines, recipe, run_until, timeless, train, write_recipe
from support.sampling import local_sampler
from support.tiny import make_tokenizer, save_model
from uniapl import cli
from uniapl.errors import Interrupted
from uniapl.rollout import SampleRequest, engines
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.types import derive_seed

ASKED_BEFORE_TRAINING = 1
"""Completion requests of the check: the canary."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSE", 0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """A server that starts with another model than the trained one."""
    with serving(FakeServer(save_model(tmp_path / "theirs", seed=9))) as fake:
        yield fake


def ahead(model_dir: Path, output: Path, fake: FakeServer, **changes: Any) -> dict[str, Any]:
    rollout = behind(fake, max_off_policy_steps=1) | changes.pop("rollout", {})
    return recipe(model_dir, output, rollout=rollout, **changes)


def staleness(run: Path) -> list[float]:
    return [record["rollout/staleness"] for record in lines(run / "metrics.jsonl")]


def test_an_evaluation_between_the_steps_changes_no_rollout(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """vLLM finishes the next step's rollouts before it gets the weights that are evaluated."""
    train(ahead(model_dir, tmp_path / "evaluated", server, **evaluated(tmp_path)))
    train(ahead(model_dir, tmp_path / "blind", server))
    ours, theirs = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("evaluated", "blind"))
    scores = [[record.pop(key) for key in list(record) if key.startswith("eval/")] for record in ours]
    assert [len(values) for values in scores] == [0, 4, 0, 4]
    assert ours == theirs
    assert staleness(tmp_path / "evaluated") == [0, 1, 1, 1]


def test_rollouts_are_of_the_weights_a_step_before(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """Step 1 uses its own weights, later steps those of the checkpoint before, as a local sampler shows."""
    run = tmp_path / "run"
    train(ahead(model_dir, run, server, save_steps=1, save_total_limit=10))
    assert staleness(run) == [0, 1, 1, 1]
    records = lines(run / "metrics.jsonl")
    assert records[0]["trained/sampling_logp_difference/max"] < 1e-4
    assert all(r["trained/sampling_logp_difference/mean"] > 1e-3 for r in records[1:]), "corrected for"
    # Before training, and in each step but the last, which starts no rollouts.
    assert server.loads == 1 + 3
    sampled = lines(run / "completions.jsonl")
    for step in (2, 3, 4):
        weights = model_dir if step == 2 else checkpoint.checkpoint_path(run, step - 2)
        sampler = local_sampler(
            model=AutoModelForCausalLM.from_pretrained(weights),
            stop_ids=[make_tokenizer().eos_token_id],
            pad_id=0,
            max_completion_length=6,
            temperature=1.0,
        )
        groups = [r for r in sampled if r["step"] == step]
        prompts = [tuple(make_tokenizer()(group["prompt"]).input_ids) for group in groups]
        seeds = [derive_seed(0, "rollout", step - 1, slot) % engines.SEEDS for slot in range(len(groups))]
        again = sampler.sample(SampleRequest(prompts=prompts, seeds=seeds, num_generations=4))
        decode = make_tokenizer().decode
        texts = [[decode(r.completion_ids, skip_special_tokens=True) for r in group] for group in again]
        assert [[c["text"] for c in group["completions"]] for group in groups] == texts


def test_the_server_answers_while_the_step_trains(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """It returns nothing for the second step until the rewards of the first are computed."""
    trains = threading.Event()
    respond = server.respond

    def after(handler: Any, body: Any) -> None:
        if handler.path == "/v1/completions" and server.loads == 1 and server.cannot_wait <= 0:
            assert trains.wait(timeout=20)
        server.cannot_wait -= handler.path == "/v1/completions"
        respond(handler, body)

    def reward(completions: list[str]) -> list[float]:
        trains.set()
        return [float(len(text)) for text in completions]

    # The canary and the first step's three prompts.
    server.cannot_wait = ASKED_BEFORE_TRAINING + 3  # type: ignore[attr-defined]
    server.respond = after  # type: ignore[method-assign]
    train(ahead(model_dir, tmp_path / "run", server), reward_functions=[reward])
    assert trains.is_set()
    assert staleness(tmp_path / "run") == [0, 1, 1, 1]


@pytest.mark.parametrize("killed_in", [2, 3])
def test_a_killed_run_resumes_to_the_same_result(
    killed_in: int, model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """The rollouts that are pending when the checkpoint is saved are in the checkpoint."""
    whole, broken = (ahead(model_dir, tmp_path / name, server) for name in ("whole", "broken"))
    train(whole)
    run_until(killed_in, broken)
    state = json.loads((checkpoint.checkpoint_path(tmp_path / "broken", 2) / "state.json").read_text())
    assert [len(kept["rollouts"]) for kept in state["ahead"]] == [4, 4, 4]
    train(broken | {"resume": "auto"})
    assert timeless(lines(tmp_path / "broken" / "metrics.jsonl")) == timeless(
        lines(tmp_path / "whole" / "metrics.jsonl")
    )


def test_a_resume_with_another_recipe_samples_again(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """Saved rollouts with other settings are not used, and none without the option."""
    for name, changed in {
        "more": {"num_generations": 3},
        "cooler": {"temperature": 0.9},
        "shorter": {"max_completion_length": 5},
        "stopping": {"stop_strings": ["e", "t"]},
        "without": {"max_off_policy_steps": 0},
    }.items():
        values = ahead(model_dir, tmp_path / name, server)
        run_until(3, values)
        train(ahead(model_dir, tmp_path / name, server, rollout=changed) | {"resume": "auto"})
    for name in ("more", "cooler", "shorter", "stopping"):
        assert staleness(tmp_path / name) == [0, 1, 0, 1]
    assert staleness(tmp_path / "without") == [0, 1, 0, 0]


def test_a_server_that_is_lost_on_the_way(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """It is lost while sampling step 3, which is then sampled with its own weights."""
    # Steps 1 and 2 with one canary, step 3's canary, and its second prompt.
    server.dies_at, server.gone_for = {ASKED_BEFORE_TRAINING + 1 + 3 + 3 + 1 + 2}, 3
    train(ahead(model_dir, tmp_path / "run", server))
    assert staleness(tmp_path / "run") == [0, 1, 0, 1]
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert records[2]["trained/sampling_logp_difference/max"] < 1e-4


def fails_from_the_third_step(fake: FakeServer) -> None:
    """The rollouts of step 3, pending when step 2 is saved, are too few."""
    answer, asked = fake.answer, 0

    def too_few(prompt: Any, body: Any) -> Any:
        nonlocal asked
        asked += 1
        # Steps 1 and 2 with one canary, and step 3's canary.
        return answer(prompt, body)[asked > ASKED_BEFORE_TRAINING + 1 + 3 + 3 + 1 :]

    fake.answer = too_few  # type: ignore[method-assign]


def test_rollouts_that_fail_do_not_cost_the_finished_step(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    values = ahead(model_dir, tmp_path / "run", server)
    answer = server.answer
    fails_from_the_third_step(server)
    with pytest.raises(uniapl.UniAPLError, match=r"malformed completions.*--resume auto"):
        train(values)
    saved = checkpoint.checkpoint_path(tmp_path / "run", 2)
    assert not checkpoint.defects(saved)
    assert json.loads((saved / "state.json").read_text())["ahead"] == []
    server.answer = answer  # type: ignore[method-assign]
    train(values | {"resume": "auto"})
    assert staleness(tmp_path / "run") == [0, 1, 0, 1]


def test_rollouts_that_are_not_needed_may_fail(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """An interrupted run and a stage that stops early end normally."""
    calls = 0

    def interrupting(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        # The first call is the trial before training.
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return [float(len(text)) for text in completions]

    answer = server.answer
    fails_from_the_third_step(server)
    with pytest.raises(Interrupted, match="step-000002"):
        train(ahead(model_dir, tmp_path / "run", server), reward_functions=[interrupting])
    server.answer = answer  # type: ignore[method-assign]
    fails_from_the_third_step(server)
    stop = {"metric": "step", "target": 2.0}
    assert train(ahead(model_dir, tmp_path / "ended", server, early_stopping=stop)).steps == 2


def test_a_stage_that_ends_early_skips_no_prompts(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """Rollouts of a step that does not follow are dropped; the next stage starts with its prompts."""
    stages: list[dict[str, Any]] = [
        {"method": "grpo", "max_steps": 5, "early_stopping": {"metric": "reward", "target": -1.0}},
        {"method": "grpo", "max_steps": 2},
    ]
    run = tmp_path / "run"
    train(ahead(model_dir, run, server, stages=stages))
    assert staleness(run) == [0, 0, 1]
    rows = [record["row"] for record in lines(run / "completions.jsonl")]
    assert len(set(rows)) == 9, "none of the twelve prompts came twice"


@pytest.mark.distributed
def test_two_processes(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """Two ranks sample the completions of one, and continue from a checkpoint of one."""
    server_values = ahead(model_dir, tmp_path, server)["rollout"]
    path = write_recipe(tmp_path, model_dir, max_steps=3, save_steps=1, save_total_limit=5)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"rollout": values["rollout"] | server_values}))
    arguments = ["train", str(path), "--output-dir"]
    assert cli.run([*arguments, str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "uniapl.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = str(checkpoint.checkpoint_path(tmp_path / "one", 1))
    for output, resume in {"two": "never", "further": first}.items():
        command = [sys.executable, *launcher, *arguments, str(tmp_path / output), "--resume", resume]
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    assert staleness(tmp_path / "two") == staleness(tmp_path / "one") == [0, 1, 1]
    one, two, further = (lines(tmp_path / name / "completions.jsonl") for name in ("one", "two", "further"))
    texts = [[c["text"] for c in record["completions"]] for record in one]
    assert [[c["text"] for c in record["completions"]] for record in two] == texts
    assert [[c["text"] for c in r["completions"]] for r in further] == texts[-len(further) :]
    assert staleness(tmp_path / "further") == [1, 1]


def test_it_needs_a_server(model_dir: Path, tmp_path: Path) -> None:
    for rollout in ({}, {"sampler": "vllm"}):
        values = recipe(model_dir, tmp_path / "run", rollout=rollout | {"max_off_policy_steps": 1})
        with pytest.raises(
            uniapl.UsageError, match=r"max_off_policy_steps 1 needs sampler vllm and vllm_mode server"
        ):
            train(values)
