"""vLLM itself, on a CPU: `make test-vllm`. It has the trainer's weights in every step, or the run ends.

Of an untied model: vLLM's CPU build keeps the old output head of a tied one, which is the last test.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from support.runs import lines, recipe, train
from support.tiny import SMALL, make_tokenizer, random_rows
from uniapl.data.batching import collate
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.policy import Policy
from uniapl.rollout import SampleRequest
from uniapl.rollout.engines import Colocated, Server
from uniapl.rollout.vllm import VLLMSampler
from uniapl.teacher.local import LocalTeacher
from uniapl.teacher.server import TeacherServer
from uniapl.training.checkpoint.directory import checkpoint_path
from uniapl.types import Rollout

pytest.importorskip("vllm")

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21)]
TEMPERATURE = 0.7
TOLERANCE = 2e-2
"""Nats by which the log-probability of a token may differ; they are computed in fp32 by other kernels."""


def make_model(seed: int, *, tied: bool = False) -> PreTrainedModel:
    """A model with heads of 32, which vLLM's attention needs on a CPU."""
    torch.manual_seed(seed)
    # Large weights, so that the distributions of different seeds and steps differ.
    shape = {"head_dim": 32, "initializer_range": 0.1, "tie_word_embeddings": tied}
    return AutoModelForCausalLM.from_config(Qwen3Config(**(SMALL | shape))).eval()


def make_sampler(engine: Colocated | Server, model: PreTrainedModel, directory: Path) -> VLLMSampler:
    return VLLMSampler(
        engine=engine,
        model=model,
        autocast=nullcontext,
        directory=directory / "weights",
        canary=PROMPTS[0],
        tolerance=TOLERANCE,
        temperature=TEMPERATURE,
        stop_ids={1, 2, 3},
        max_completion_length=12,
    )


def sample(sampler: VLLMSampler, version: int) -> list[tuple[Rollout, ...]]:
    seeds = range(100, 100 + len(PROMPTS))
    return sampler.sample(
        SampleRequest(prompts=PROMPTS, seeds=list(seeds), num_generations=6, policy_version=version)
    )


def move(model: PreTrainedModel, seed: int) -> None:
    """An update that changes every distribution."""
    model.load_state_dict(make_model(seed).state_dict())


def worst_difference(model: PreTrainedModel, groups: list[tuple[Rollout, ...]]) -> float:
    """Of the reported log-probabilities from the model's, computed here, row by row."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for rollout in group:
            ids = torch.tensor([[*prompt, *rollout.completion_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logprobs = torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
            worst = max(worst, float((logprobs - torch.tensor(rollout.sampling_logprobs)).abs().max()))
    return worst


def check_sampling(sampler: VLLMSampler, model: PreTrainedModel) -> None:
    """New weights of every version arrive, completions end correctly, a skipped version is detected."""
    before: list[list[tuple[int, ...]]] = []
    for version in range(4):
        move(model, seed=version)
        groups = sample(sampler, version)
        assert worst_difference(model, groups) < TOLERANCE
        rollouts = [rollout for group in groups for rollout in group]
        assert {r.policy_version for r in rollouts} == {version}
        assert {r.finish_reason for r in rollouts} == {"stop", "length"}
        for rollout in rollouts:
            *body, last = rollout.completion_ids
            assert not {1, 2, 3} & set(body)
            assert (last in (1, 2, 3)) == (rollout.finish_reason == "stop")
            assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 12
        assert len({r.completion_ids for r in groups[0]}) > 1, "the rollouts of a group differ"
        ids = [[r.completion_ids for r in group] for group in groups]
        assert ids not in before, "the weights decide"
        before.append(ids)
    again = [[r.completion_ids for r in group] for group in sample(sampler, 3)]
    assert again == before[-1], "the seeds decide"
    assert worst_difference(make_model(seed=0), groups) > 10 * TOLERANCE, "old weights would be seen"

    class Deaf:
        """Ignores new weights."""

        def load(self, directory: Path) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    engine, sampler.engine = sampler.engine, Deaf()  # type: ignore[assignment]
    move(model, seed=4)
    with pytest.raises(UniAPLError, match="does not sample with the weights sent after step 4"):
        sample(sampler, 4)


def colocated(*, max_model_len: int = 64) -> Colocated:
    settings = {
        "dtype": "float32",
        "max_model_len": max_model_len,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": True,
    }
    return Colocated(settings=settings, timeout=300.0)


def test_colocated(tmp_path: Path) -> None:
    model = make_model(0)
    check_sampling(make_sampler(colocated(), model, tmp_path), model)
    assert not (tmp_path / "weights").exists()


def start_server(directory: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    flags = "--dtype float32 --enforce-eager --max-model-len 64 --max-num-seqs 16"
    flags += f" --logprobs-mode processed_logprobs --port {port} --host 127.0.0.1"
    return subprocess.Popen(
        # What `vllm serve` starts; that command does not find its own version under the CPU build's name.
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, *flags.split()],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(server: subprocess.Popen[bytes]) -> None:
    """Kill a server with its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(60)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(model_dir: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Server]]:
    port = free_port()
    process = start_server(model_dir, port, tmp_path / "server.log")
    engine = Server(url=f"http://127.0.0.1:{port}", timeout=300.0)
    try:
        engine.wait()
        yield process, engine
    finally:
        stop(process)


def test_server(server: tuple[subprocess.Popen[bytes], Server], model_dir: Path, tmp_path: Path) -> None:
    _, engine = server
    model = make_model(0)
    check_sampling(make_sampler(engine, model, tmp_path), model)


def test_a_server_that_was_restarted_gets_the_weights_again(
    server: tuple[subprocess.Popen[bytes], Server], model_dir: Path, tmp_path: Path
) -> None:
    process, engine = server
    model = make_model(5)
    sampler = make_sampler(engine, model, tmp_path)
    first = sample(sampler, 1)
    stop(process)
    port = int(engine.url.rpartition(":")[2])
    successor = start_server(model_dir, port, tmp_path / "successor.log")
    try:
        # The version is the same: the weights are sent only because the loss was detected.
        again = sample(sampler, 1)
    finally:
        stop(successor)
    assert worst_difference(model, again) < TOLERANCE
    assert [[r.completion_ids for r in g] for g in again] == [[r.completion_ids for r in g] for g in first]


def test_a_run(model_dir: Path, tmp_path: Path) -> None:
    """Every step's rollouts come from that step's weights, as the trainer's log-probabilities show."""
    values = recipe(model_dir, tmp_path / "run", rollout={"sampler": "vllm", "vllm_timeout": 300.0})
    train(values)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4
    for record in records:
        assert record["trained/sampling_logp_difference/max"] < TOLERANCE
        assert abs(record["trained/importance_sampling_ratio/mean"] - 1) < TOLERANCE
    assert records[0]["loss"] != records[-1]["loss"]


def test_a_run_one_step_off(
    server: tuple[subprocess.Popen[bytes], Server], model_dir: Path, tmp_path: Path
) -> None:
    """From the second step on, rollouts come from the previous weights, with their log-probabilities."""
    _, engine = server
    rollout = {"sampler": "vllm", "vllm_mode": "server", "vllm_server_base_url": engine.url}
    values = recipe(model_dir, tmp_path / "run", rollout=rollout | {"max_off_policy_steps": 1}, save_steps=1)
    train(values | {"save_total_limit": 9})
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["rollout/staleness"] for record in records] == [0, 1, 1, 1]
    assert records[0]["trained/sampling_logp_difference/max"] < TOLERANCE
    assert records[1]["trained/sampling_logp_difference/max"] > TOLERANCE
    for step in (1, 2):
        # Of the weights after `step - 1` steps, for the step after the next.
        path = checkpoint_path(tmp_path / "run", step)
        kept = json.loads((path / "state.json").read_text(encoding="utf-8"))["ahead"]
        before = model_dir if step == 1 else checkpoint_path(tmp_path / "run", step - 1)
        model = AutoModelForCausalLM.from_pretrained(before)
        for group in kept:
            for rollout in group["rollouts"]:
                assert rollout["policy_version"] == step - 1
                ids = torch.tensor([group["prompt_ids"] + rollout["completion_ids"]])
                logprobs = model(ids).logits[0].log_softmax(-1)
                first = len(group["prompt_ids"])
                ours = logprobs[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
                theirs = torch.tensor(rollout["sampling_logprobs"])
                assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_teacher_behind_the_server_gives_what_the_model_gives(
    server: tuple[subprocess.Popen[bytes], Server], top_k: int
) -> None:
    _, engine = server
    teacher = TeacherServer(url=engine.url, top_k=top_k, timeout=60.0, max_retries=0)
    teacher.check(make_tokenizer(), ["say a."], 63)
    with pytest.raises(UsageError, match="reads at most 64 tokens"):
        teacher.check(make_tokenizer(), ["say a."], 64)
    batch = collate([replace(row, temperature=1.0) for row in random_rows()], pad_id=0)
    (served,) = teacher.read([batch])
    (local,) = LocalTeacher(model=Policy(make_model(0)), top_k=top_k).read([batch])
    assert served.teacher_logprobs is not None
    assert local.teacher_logprobs is not None
    assert float(local.teacher_logprobs.abs().sum()) > 10
    torch.testing.assert_close(served.teacher_logprobs, local.teacher_logprobs, atol=TOLERANCE, rtol=0)
    if top_k:
        assert served.teacher_ids is not None
        torch.testing.assert_close(served.teacher_ids, local.teacher_ids)


def test_the_cpu_build_does_not_reload_a_tied_head(tmp_path: Path) -> None:
    """A defect of vLLM that the canary detects. Once this fails, docs/gpus.md need not mention it."""
    model = make_model(0, tied=True)
    sampler = make_sampler(colocated(), model, tmp_path)
    sample(sampler, 0)
    model.load_state_dict(make_model(1, tied=True).state_dict())
    with pytest.raises(UniAPLError, match="does not sample with the weights sent"):
        sample(sampler, 1)
