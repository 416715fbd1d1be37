"""Rollouts with tools from a fake vLLM: those of the local sampler, with the tools on rank 0."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_tools import Scripted, right, rows
from integration.test_tools_on_processes import save_start
from integration.test_tools_on_processes import values as tool_recipe
from support import fake_vllm
from support.fake_vllm import FakeServer, FakeVLLM, behind, install, serving
from support.processes import run_processes
from support.runs import Killed, lines, timeless, train
from uniapl.rollout import SampleRequest, engines
from uniapl.training import build_sampler, evaluation
from uniapl.types import Rollout

WHOLE = 150
"""Tokens of a call, its result and the answer."""
LIMIT = WHOLE - 1
"""Limit of the rollouts, which cuts the end token of an answer after a call; evaluation has room for it."""


class Cut(Scripted):
    """Keeps the limit of the request, as samplers do."""

    def turn(self, prompt: tuple[int, ...], seed: int, request: SampleRequest) -> Rollout:
        rollout = super().turn(prompt, seed, request)
        limit = request.max_completion_length or self.values["settings"].max_completion_length
        ids = rollout.completion_ids[:limit]
        reason = "stop" if len(ids) == len(rollout.completion_ids) else "length"
        return Rollout(
            completion_ids=ids,
            sampling_logprobs=(-1.0,) * len(ids),
            finish_reason=reason,
            policy_version=request.policy_version,
        )


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model; all samplers write the same turns."""
    monkeypatch.setattr(engines, "PAUSE", 0.02)
    monkeypatch.setattr(engines, "SEEDS", 2**63)
    for module in (build_sampler, evaluation, fake_vllm):
        monkeypatch.setattr(module, "LocalSampler", Cut)
    save_start(tmp_path)
    return tmp_path


@pytest.fixture
def server(start: Path) -> Iterator[FakeServer]:
    with serving(FakeServer(start / "model")) as fake:
        yield fake


def run(start: Path, name: str, rollout: dict[str, Any], *, reward: Any = right, **changes: Any) -> Path:
    values = tool_recipe(start, start / name, **changes)
    values["rollout"] |= {"max_completion_length": LIMIT, **rollout}
    values["evaluation"] |= {"max_completion_length": WHOLE}
    train(values, train_dataset=rows(), reward_functions=[reward])
    return start / name


def completions(path: Path) -> list[Any]:
    names = ("text", "messages", "tokens", "finish_reason", "reward")
    return [[c[n] for n in names] for line in lines(path / "completions.jsonl") for c in line["completions"]]


def test_tools_with_vllm(start: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colocated and behind a server: the trajectories and scores of the local sampler."""
    started = install(monkeypatch)
    asked: list[int] = []
    prompts: list[int] = []
    answer = FakeVLLM.answer

    def recorded(self: FakeVLLM, prompt: Any, wanted: dict[str, Any]) -> Any:
        asked.append(len(prompt) + wanted["max_tokens"])
        prompts.append(len(prompt))
        return answer(self, prompt, wanted)

    monkeypatch.setattr(FakeVLLM, "answer", recorded)
    local = run(start, "local", {})
    records = lines(local / "metrics.jsonl")
    assert sum(record["tools/call_frequency"] for record in records) > 0.5
    for one in completions(local):
        text, messages, _, reason, _ = one
        assert messages[-1]["role"] == "assistant", "no reward function takes a result for the answer"
        assert (reason == "length") == (len(messages) == 3) == ("<tool_call>" in text)
    for name, rollout in {"colocated": {"sampler": "vllm"}, "server": behind(server)}.items():
        asked.clear()
        path = run(start, name, rollout)
        assert completions(path) == completions(local)
        for record, expected in zip(lines(path / "metrics.jsonl"), records, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
            assert record["trained/sampling_logp_difference/max"] < 1e-3
            for key in ("tools/call_frequency", "eval/suite/reward", "tokens/rl"):
                assert record.get(key) == expected.get(key)
        # A server refuses requests beyond its context, which need not exceed a prompt with its completion.
        (engine,) = started
        assert max(asked) == engine.settings["max_model_len"] == min(prompts) + WHOLE


def test_tools_one_step_off(start: Path, server: FakeServer) -> None:
    """Turns are sampled in the background with the weights from before the update, also after a resume."""
    off = behind(server, max_off_policy_steps=1)
    whole = run(start, "whole", off)
    records = lines(whole / "metrics.jsonl")
    assert [record["rollout/staleness"] for record in records] == [0, 1, 1, 1]
    assert sum(record["tools/call_frequency"] for record in records) > 0.5
    # The prompts and seeds are those of a run that samples before each step, and so are the turns.
    assert completions(whole) == completions(run(start, "local", {}))
    metrics = start / "broken" / "metrics.jsonl"

    def deadly(completions: list[Any], total: list[int]) -> list[float]:
        if metrics.exists() and len(lines(metrics)) == 2:
            raise Killed
        return right(completions, total)

    deadly.__name__ = "right"
    changes = {"rewards": {"timeout": None}, "eval_steps": 0}
    with pytest.raises(Killed):
        run(start, "broken", off, reward=deadly, **changes)
    resumed = run(start, "broken", off, resume="auto", **changes)
    assert completions(resumed) == completions(whole)
    for mine, other in zip(lines(resumed / "metrics.jsonl"), records, strict=True):
        assert mine["tools/call_frequency"] == other["tools/call_frequency"]
        assert mine["loss"] == other["loss"]


def test_a_server_that_dies_between_two_turns(start: Path, server: FakeServer) -> None:
    """The rollouts are sampled again from their beginning, with the same weights."""
    whole = run(start, "whole", behind(server), eval_steps=0)
    requests = [number for number, path in enumerate(server.asked) if path == "/v1/completions"]
    assert len(requests) > 20
    server.asked.clear()
    # In step 1: a canary before training, one of the step, three prompts, then the second turns.
    server.dies_at, server.gone_for = {7}, 2
    shaken = run(start, "shaken", behind(server), eval_steps=0)
    assert server.asked.count("/health") > 5
    assert timeless(lines(shaken / "metrics.jsonl")) == timeless(lines(whole / "metrics.jsonl"))
    assert completions(shaken) == completions(whole)


RECORDED = '''
import os

def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    with open(os.environ["CALLS"], "a") as file:
        file.write(os.environ.get("RANK", "0"))
    return a + b
'''


def _train(folder: Path, calls: str, recipes: list[dict[str, Any]]) -> None:
    os.environ["CALLS"] = calls
    build_sampler.LocalSampler = evaluation.LocalSampler = Cut  # type: ignore[misc,assignment]
    for values in recipes:
        train(values, train_dataset=rows(), reward_functions=[right])


@pytest.mark.distributed
@pytest.mark.parametrize("steps", [0, 1])
def test_tools_run_on_rank_zero(
    steps: int, start: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with one server: the trajectories and scores of one process, the tools in the first."""
    # The other ranks do not run this file's fixtures.
    monkeypatch.setattr(engines, "SEEDS", 2**62)
    (start / "mine.py").write_text(RECORDED)
    monkeypatch.setenv("CALLS", str(start / "calls of one"))
    rollout = behind(server, max_off_policy_steps=steps)
    one = run(start, "one", rollout, max_steps=2)
    values = tool_recipe(start, start / "two", max_steps=2)
    values["rollout"] |= {"max_completion_length": LIMIT, **rollout}
    values["evaluation"] |= {"max_completion_length": WHOLE}
    (start / "processes").mkdir()
    assert run_processes(2, _train, start / "processes", str(start / "calls"), [values]) == [0, 0]
    assert completions(start / "two") == completions(one)
    for mine, other in zip(*(lines(start / name / "metrics.jsonl") for name in ("two", "one")), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)
        for key in ("tools/call_frequency", "eval/suite/reward", "tokens/rl"):
            assert mine.get(key) == other.get(key)
    calls = (start / "calls of one").read_text()
    assert (start / "calls").read_text() == calls
    assert calls == "0" * len(calls)
    assert len(calls) > 5
