"""Whole runs whose rollouts call tools."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from support.runs import Killed, lines, recipe, timeless, train
from support.templates import byte_tokenizer, template
from support.tiny import SMALL
from uniapl.rollout import SampleRequest
from uniapl.training import build_sampler
from uniapl.types import Rollout, derive_seed

SOURCE = '''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b
'''
SEEN: list[Any] = []


def right(completions: list[Any], total: list[int]) -> list[float]:
    SEEN.extend(completions)
    return [
        float(completion[-1]["content"] == str(x)) for completion, x in zip(completions, total, strict=True)
    ]


def rows() -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    shown = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    asked = [[{"role": "user", "content": f"{n} and 2?"}] for n in range(6)]
    return [
        {"prompt": prompt, "total": n + 2} | ({"completion": shown} if n == 1 else {})
        for n, prompt in enumerate(asked)
    ]


class Scripted:
    """A local sampler that writes one of three turns by the seed: a call, a right answer, a wrong one."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.tokenizer = byte_tokenizer(template("qwen2_5"), "<|im_end|>")

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        return [
            tuple(self.turn(prompt, derive_seed(seed, n), request) for n in range(request.num_generations))
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]

    def turn(self, prompt: tuple[int, ...], seed: int, request: SampleRequest) -> Rollout:
        text = str(self.tokenizer.decode(list(prompt)))
        number = int(text.partition("<|im_start|>user\n")[2][0])
        answered = "<tool_response>" in text
        kind = seed % 3 if not answered else 1 + seed % 2
        call = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {number}, "b": 2}}}}\n</tool_call>'
        written = (call, str(number + 2), "0")[kind] + "<|im_end|>"
        ids = tuple(self.tokenizer(written, add_special_tokens=False).input_ids)
        return Rollout(
            completion_ids=ids,
            sampling_logprobs=(-1.0,) * len(ids),
            finish_reason="stop",
            policy_version=request.policy_version,
        )

    def check(self) -> None: ...


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(build_sampler, "LocalSampler", Scripted)
    (tmp_path / "mine.py").write_text(SOURCE)
    tokenizer = byte_tokenizer(template("qwen2_5"), "<|im_end|>")
    config = AutoConfig.for_model(
        "qwen3", **{**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {
        "rollout": {"tools": [f"{tmp_path / 'mine.py'}:add"], "max_completion_length": 400},
        "batching": {"max_tokens_per_micro_batch": 4000},
        "objective": {"adversarial_placement": "multiply"},
        "discriminator": {"kind": "reference-likelihood"},
    }
    return recipe(tmp_path / "model", tmp_path / "run", **changes)


def test_a_run_with_tools(values: dict[str, Any], tmp_path: Path) -> None:
    SEEN.clear()
    train(values, train_dataset=rows(), reward_functions=[right])
    records = lines(tmp_path / "run" / "metrics.jsonl")
    logged = lines(tmp_path / "run" / "completions.jsonl")
    completions = [c for line in logged for c in line["completions"]]
    called = [c for c in completions if len(c["messages"]) > 1]
    assert called
    for one in called:
        assert [m["role"] for m in one["messages"]] == ["assistant", "tool", "assistant"]
        (call,) = one["messages"][0]["tool_calls"]
        arguments = call["function"]["arguments"]
        assert one["messages"][1]["content"] == str(arguments["a"] + arguments["b"])
        # The masks: what the policy wrote is its turns with their end tokens; the rest was given.
        written, given, last = one["segments"]
        assert [part["written"] for part in one["segments"]] == [True, False, True]
        turns = [one["messages"][n]["content"] + "<|im_end|>" for n in (0, 2)]
        assert [written["text"], last["text"]] == turns
        result = one["messages"][1]["content"]
        assert given["text"] == (
            f"\n<|im_start|>user\n<tool_response>\n{result}\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert one["tool_use"] == {"calls": 1, "failures": [], "malformed": 0, "unanswered": 0}
        assert one["reward"] == float(one["messages"][2]["content"] == one["messages"][1]["content"])
    for line in logged:
        shown = line.get("demonstration_segments", [])
        assert [part["written"] for part in shown] == [True, False, True] * bool(line["demonstration"])
        assert "".join(part["text"] for part in shown).count("<|im_end|>") == 3 * bool(shown)
    assert any("demonstration_segments" in line for line in logged)
    frequencies = [record["tools/call_frequency"] for record in records]
    assert sum(frequencies) * 12 == pytest.approx(len(called))
    assert all(record["tools/failure_frequency"] == 0 for record in records)
    # The tokens of results are in no component: each rollout counts the tokens of its own turns.
    for record in records:
        own = [c["tokens"] for line in logged if line["step"] == record["step"] for c in line["completions"]]
        assert record["tokens/rl"] == record["tokens/rollout"] == sum(own)
    assert any(isinstance(one, list) and len(one) == 3 for one in SEEN), "reward functions get the messages"
    assert any("discriminator/win_rate" in record for record in records)


def test_a_run_with_tools_resumes_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    train(values, train_dataset=rows(), reward_functions=[right])
    again = {**values, "output_dir": str(tmp_path / "again"), "rewards": {"timeout": None}}
    calls = 0

    def deadly(completions: list[Any], total: list[int]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in step 4; the first call is the trial before training
            raise Killed
        return right(completions, total)

    deadly.__name__ = "right"
    with pytest.raises(Killed):
        train(again, train_dataset=rows(), reward_functions=[deadly])
    train(again | {"resume": "auto"}, train_dataset=rows(), reward_functions=[right])
    mine, theirs = (tmp_path / name for name in ("again", "run"))
    assert timeless(lines(mine / "metrics.jsonl")) == timeless(lines(theirs / "metrics.jsonl"))
    assert lines(mine / "completions.jsonl") == lines(theirs / "completions.jsonl")
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (mine, theirs)]
    assert weights[0] == weights[1]
