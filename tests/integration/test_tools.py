"""Whole runs whose rollouts call tools."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from support.processes import run_processes
from support.runs import Killed, lines, recipe, timeless, train
from support.templates import byte_tokenizer, template
from support.tiny import SMALL
from uniapl import cli
from uniapl.rollout import SampleRequest
from uniapl.training import build_sampler, evaluation
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


GAME = '''
import threading
from dataclasses import dataclass


@dataclass
class Observation:
    text: str
    done: bool


class Client:
    """Stands for the client of a server."""

    def __init__(self, base_url: str):
        self.base_url = base_url
        self.connection = threading.Lock()  # like a socket, it cannot be pickled

    def reset(self, secret: int) -> Observation:
        self.secret = secret
        return Observation("I think of a number from 0 to 2.", False)

    def step(self, number: int) -> Observation:
        if number == self.secret:
            return Observation("right", True)
        return Observation("higher" if self.secret > number else "lower", False)


URL = "http://localhost:8001"


class GuessEnv:
    def __init__(self):
        self.client = Client(base_url=URL)

    def reset(self, **kwargs) -> str | None:
        observation = self.client.reset(kwargs["secret"])
        self.reward = 0.0
        self.done = False
        return observation.text

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess, from 0 to 2.

        Returns:
            Whether the number is higher, lower or right.
        """
        if self.done:
            raise ValueError("Game over.")
        observation = self.client.step(number)
        self.done = observation.done
        self.reward = 1.0 if self.done else self.reward - 0.25
        return observation.text


def multiply(a: int, b: int) -> int:
    """
    Multiply two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        Their product.
    """
    return a * b


def from_environment(environments, **kwargs):
    return [environment.reward for environment in environments]
'''
"""An environment, a tool and a reward function in the form of TRL's documentation."""
PLAYED: list[tuple[float, Any]] = []


def watched(completions: list[Any], environments: list[Any], secret: list[int]) -> list[float]:
    """Sees that the instance and the completion belong to the same rollout of the same row."""
    for completion, environment, number in zip(completions, environments, secret, strict=True):
        assert environment.client.secret == number
        if isinstance(completion, list) and any(m["role"] == "assistant" for m in completion[:-1]):
            PLAYED.append((environment.reward, completion))
    return [0.0 for _ in environments]


def reward_of(messages: list[dict[str, Any]]) -> float:
    """The reward of the game by what the policy read."""
    reward = 0.0
    for answer in (m["content"] for m in messages if m["role"] == "tool" and m["name"] == "guess"):
        if "Game over" not in answer:
            reward = 1.0 if answer == "right" else reward - 0.25
    return reward


class Player(Scripted):
    """Guesses, multiplies or stops by the seed."""

    def turn(self, prompt: tuple[int, ...], seed: int, request: SampleRequest) -> Rollout:
        text = str(self.tokenizer.decode(list(prompt)))
        assert text.count("I think of a number from 0 to 2.<|im_end|>") == 1
        assert '"name": "guess"' in text
        assert '"name": "multiply"' in text
        call = {"name": "guess", "arguments": {"number": seed // 4 % 3}}
        if seed % 4 == 1:
            call = {"name": "multiply", "arguments": {"a": 3, "b": 5}}
        written = f"<tool_call>\n{json.dumps(call)}\n</tool_call>" if seed % 4 else "I stop."
        ids = tuple(self.tokenizer(f"{written}<|im_end|>", add_special_tokens=False).input_ids)
        return Rollout(
            completion_ids=ids,
            sampling_logprobs=(-1.0,) * len(ids),
            finish_reason="stop",
            policy_version=request.policy_version,
        )


def game_recipe(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with a game in which nothing of TRL's form is changed."""
    path = folder / "game.py"
    path.write_text(GAME)
    suite = folder / "held_out.jsonl"
    suite.write_text("".join(f"{json.dumps(row)}\n" for row in game_rows()[::-1]))
    rollout = {
        **{"tools": [f"{path}:multiply"], "environment": f"{path}:GuessEnv"},
        **{"max_completion_length": 1500, "max_tool_calling_iterations": 3},
    }
    return {
        **values,
        "rollout": {**values["rollout"], **rollout},
        "rewards": {"functions": [{"name": f"{path}:from_environment"}]},
        "eval_steps": 2,
        "evaluation": {"suites": [str(suite)], "max_completion_length": 1500},
    }


@pytest.fixture
def game(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for module in (build_sampler, evaluation):
        monkeypatch.setattr(module, "LocalSampler", Player)
    return game_recipe(values, tmp_path)


def game_rows() -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "guess", "arguments": {"number": 1}}}
    shown = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "guess", "content": "right"},
        {"role": "assistant", "content": "It is 1."},
    ]
    return [
        {"prompt": [{"role": "user", "content": f"Round {n}. "}], "secret": n % 3}
        | ({"completion": shown} if n == 1 else {})
        for n in range(6)
    ]


def test_a_run_with_trl_s_environment(game: dict[str, Any], tmp_path: Path) -> None:
    PLAYED.clear()
    train(game, train_dataset=game_rows(), reward_functions=[watched])
    logged = lines(tmp_path / "run" / "completions.jsonl")
    completions = [c for line in logged for c in line["completions"]]
    assert [c["reward"] for c in completions] == [reward_of(c["messages"]) for c in completions]
    answers = {m["content"] for c in completions for m in c["messages"] if m["role"] == "tool"}
    assert answers == {"right", "higher", "lower", "15", '{"error": "Game over."}'}
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(record["tools/failure_frequency"] for record in records) > 0
    # The reward function of evaluation gets the instances too, and those of training are the logged ones.
    assert all(reward == reward_of(messages) for reward, messages in PLAYED)
    assert len(PLAYED) > sum(len(c["messages"]) > 1 for c in completions)
    assert [record["step"] for record in records if "eval/held_out/reward" in record] == [2, 4]
    assert all(line["prompt"][-1]["content"].endswith("I think of a number from 0 to 2.") for line in logged)


def test_a_run_with_an_environment_resumes_exactly(game: dict[str, Any], tmp_path: Path) -> None:
    train(game, train_dataset=game_rows(), reward_functions=[watched])
    again = {**game, "output_dir": str(tmp_path / "again")}
    again["rewards"] = {**game["rewards"], "timeout": None}
    steps: list[int] = []

    def deadly(
        completions: list[Any], environments: list[Any], secret: list[int], trainer_state: Any
    ) -> list[float]:
        steps.append(trainer_state.global_step)
        if steps[-1] == 3:
            raise Killed
        return watched(completions, environments, secret)

    deadly.__name__ = "watched"
    with pytest.raises(Killed):
        train(again, train_dataset=game_rows(), reward_functions=[deadly])
    train(again | {"resume": "auto"}, train_dataset=game_rows(), reward_functions=[watched])
    mine, theirs = (tmp_path / name for name in ("again", "run"))
    assert timeless(lines(mine / "metrics.jsonl")) == timeless(lines(theirs / "metrics.jsonl"))
    assert lines(mine / "completions.jsonl") == lines(theirs / "completions.jsonl")
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (mine, theirs)]
    assert weights[0] == weights[1]


def _train_game(folder: Path, values: dict[str, Any]) -> None:
    build_sampler.LocalSampler = evaluation.LocalSampler = Player  # type: ignore[misc,assignment]
    train(values, train_dataset=game_rows(), reward_functions=[watched])


@pytest.mark.distributed
def test_two_processes_have_their_own_instances(values: dict[str, Any], tmp_path: Path) -> None:
    """Each process rewards what it sampled; the result is that of one process."""
    game = {**game_recipe(values, tmp_path), "max_steps": 2}
    runs = [tmp_path / f"on{count}" for count in (1, 2)]
    for count, run in enumerate(runs, start=1):
        folder = tmp_path / f"store{count}"
        folder.mkdir()
        assert run_processes(count, _train_game, folder, {**game, "output_dir": str(run)}) == [0] * count
    one, two = (lines(run / "completions.jsonl") for run in runs)
    for mine, theirs in zip(two, one, strict=True):
        for name in ("text", "messages", "reward"):
            assert [c[name] for c in mine["completions"]] == [c[name] for c in theirs["completions"]]
    scores = [lines(run / "metrics.jsonl")[1]["eval/held_out/reward"] for run in runs]
    assert scores[0] == scores[1]


def test_evaluate_calls_tools(game: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`uniapl evaluate` with the recipe of a run samples and scores as the run does."""
    monkeypatch.setattr(build_sampler, "LocalSampler", Player)
    recipe_ = tmp_path / "recipe.yaml"
    recipe_.write_text(json.dumps(game))
    output = tmp_path / "evaluated"
    model = game["model"]["model_name_or_path"]
    assert cli.run(["evaluate", model, "--recipe", str(recipe_), "--output-dir", str(output)]) == 0
    completions = lines(output / "completions.jsonl")
    rewards = [reward_of(one["messages"]) for one in completions]
    assert [one["reward"] for one in completions] == [[reward] for reward in rewards]
    assert any(len(one["messages"]) > 1 for one in completions)
    summary = json.loads((output / "results.json").read_text())["suites"]["held_out"]
    assert summary["scores"]["reward"]["mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert set(summary["floors"]) == {"empty", "echo", "constant"}, "each with a fresh instance"
    assert summary["floors"]["empty"]["reward"] == 0
