"""Rollouts of several turns from vLLM itself: `make test-vllm`."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from uniapl.rollout import SampleRequest
from uniapl.rollout.engines import Colocated, Server
from uniapl.tools.sampler import ToolSampler
from uniapl.tools.trajectories import Answer
from uniapl.types import TokenIds, Tokens, ToolUse

pytest.importorskip("vllm")

from with_vllm.test_vllm import (
    PROMPTS,
    TEMPERATURE,
    TOLERANCE,
    colocated,
    make_model,
    make_sampler,
    model_dir,
    server,
)

__all__ = ["model_dir", "server"]

RESULT = (40, 41, 42)
LIMIT = 57
"""The longest prompt has 7 tokens, and the context of the server is 64."""


class Toolbox:
    """Answers the first turns with the same result; a later turn calls nothing."""

    max_iterations = 2

    def answer(self, turn: TokenIds, *, calls: bool = True, methods: Any = None) -> Answer:
        return Answer(ids=RESULT if calls else (), messages=(self.message(turn),), use=ToolUse())

    def message(self, turn: TokenIds) -> dict[str, Any]:
        return {"role": "assistant", "content": str(turn)}


def test_colocated(tmp_path: Path) -> None:
    check_turns(colocated(max_model_len=max(map(len, PROMPTS)) + LIMIT), tmp_path)


def test_server(server: tuple[subprocess.Popen[bytes], Server], tmp_path: Path) -> None:
    check_turns(server[1], tmp_path)


def check_turns(engine: Colocated | Server, tmp_path: Path) -> None:
    """Turns fit into a context of one prompt with its completion, and their log-probabilities are those of
    the trainer, after the results before them."""
    model = make_model(0)
    sampler = make_sampler(engine, model, tmp_path)
    toolbox: Any = Toolbox()
    sampler.settings = sampler.settings.limited(LIMIT)
    sampler.with_tools = lambda turns, limit: ToolSampler(
        sampler=turns, toolbox=toolbox, max_completion_length=limit
    )
    request = SampleRequest(prompts=PROMPTS, seeds=[*range(len(PROMPTS))], num_generations=8)
    groups = sampler.sample(request)
    turns: set[tuple[int, str]] = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for rollout in group:
            ids = rollout.completion_ids
            tokens = Tokens(prompt, ids, rollout.given)
            assert all(ids[start:stop] == RESULT for start, stop in rollout.given)
            assert len(ids) <= LIMIT
            assert rollout.num_sampled == tokens.num_written
            turns.add((len(rollout.given), rollout.finish_reason))
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logprobs = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            own = logprobs[torch.tensor(tokens.is_written)]
            assert float((own - torch.tensor(rollout.sampling_logprobs)).abs().max()) < TOLERANCE
    assert {count for count, _ in turns} >= {1, 2}
    assert {reason for _, reason in turns} == {"stop", "length"}
    again = sampler.sample(request)
    assert [[r.completion_ids for r in group] for group in again] == [
        [r.completion_ids for r in group] for group in groups
    ]
