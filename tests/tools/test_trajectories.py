"""Rollouts with tools: their ids, what the policy wrote of them, and how they end."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from support.templates import READ, family
from uniapl.config import DataConfig
from uniapl.data.rendering import ChatTemplate
from uniapl.data.rows import tokenize_row
from uniapl.data.tokenization import encode_results
from uniapl.rollout import SampleRequest
from uniapl.tools.calls import CallParser
from uniapl.tools.functions import tool_of
from uniapl.tools.trajectories import Toolbox, sample_trajectories
from uniapl.training.distributed.one_step_off import OneStepOffSampler
from uniapl.types import Rollout, TokenIds, ToolUse, derive_seed

CALLS: list[tuple[int, int]] = []


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    CALLS.append((a, b))
    return a + b


SCHEMAS = [dict(tool_of(add).schema)]
USER = {"role": "user", "content": "sum?"}


def call(a: int, b: int, name: str = "add") -> dict[str, Any]:
    function = {"name": name, "arguments": {"a": a, "b": b}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


def toolbox(tokenizer: Any, **changes: Any) -> Toolbox:
    form = ChatTemplate(tokenizer=tokenizer, arguments={}, tools=SCHEMAS)
    stop_ids = {tokenizer.eos_token_id}
    values: dict[str, Any] = {
        "tools": {"add": tool_of(add)},
        "parser": CallParser.of(form, stop_ids),
        "form": form,
        "stop_ids": stop_ids,
        "max_iterations": 5,
        "timeout": 5.0,
        "max_characters": 200,
    }
    return Toolbox(**(values | changes))


@dataclass
class Scripted:
    """Writes what `turn` says for a prompt, and the n-th rollout of it; every log-probability is new."""

    turn: Callable[[TokenIds, int], TokenIds]
    requests: list[SampleRequest] = field(default_factory=list)
    count: int = 0

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        self.requests.append(request)
        return [
            tuple(self._rollout(self.turn(prompt, n), request) for n in range(request.num_generations))
            for prompt in request.prompts
        ]

    def _rollout(self, ids: TokenIds, request: SampleRequest) -> Rollout:
        limit = request.max_completion_length or len(ids)
        cut = ids[:limit]
        numbers = range(self.count, self.count + len(cut))
        self.count += len(cut)
        return Rollout(
            completion_ids=cut,
            sampling_logprobs=tuple(-float(n) for n in numbers),
            finish_reason="stop" if cut == ids else "length",
            policy_version=request.policy_version,
        )

    def check(self) -> None: ...


def sampled(
    turns: Sequence[TokenIds], prompt: TokenIds, tools: Toolbox, *, most: int = 10_000
) -> tuple[Rollout, Scripted]:
    """One rollout with these turns."""
    left = list(turns)
    sampler = Scripted(turn=lambda *_: left.pop(0))
    request = SampleRequest(prompts=[prompt], seeds=[7], num_generations=1, policy_version=3)
    ((rollout,),) = sample_trajectories(sampler, request, tools, max_completion_length=most)
    return rollout, sampler


def turns_of(ids: TokenIds, given: Any) -> list[TokenIds]:
    bounds = [0, *(place for part in given for place in part), len(ids)]
    return [ids[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]


@pytest.mark.parametrize("name", READ)
def test_a_rollout_of_a_demonstration_s_turns_is_the_demonstration(name: str) -> None:
    """Same ids and same ranges: nothing distinguishes the policy from the expert but what it writes."""
    tokenizer: Any = family(name)
    messages = [
        *(USER, call(31, 57), result("88"), call(88, 2), result("90")),
        {"role": "assistant", "content": "It is 90."},
    ]
    example = tokenize_row(1, {"messages": messages, "tools": SCHEMAS}, tokenizer, DataConfig())
    demonstration = example.demonstration_tokens
    assert demonstration is not None
    turns = turns_of(demonstration.completion, demonstration.given)
    CALLS.clear()
    rollout, sampler = sampled(turns, example.prompt_ids, toolbox(tokenizer))
    assert CALLS == [(31, 57), (88, 2)]
    assert rollout.completion_ids == demonstration.completion
    assert rollout.given == demonstration.given
    assert rollout.sampling_logprobs == tuple(-float(n) for n in range(demonstration.num_written))
    assert (rollout.finish_reason, rollout.policy_version) == ("stop", 3)
    assert rollout.tool_use == ToolUse(calls=2)
    assert [m["role"] for m in rollout.messages] == ["assistant", "tool"] * 2 + ["assistant"]
    assert [m["content"] for m in rollout.messages if m["role"] == "tool"] == ["88", "90"]
    assert rollout.messages[0]["tool_calls"] == messages[1]["tool_calls"]
    assert rollout.messages[-1]["content"].endswith("It is 90.")
    # Each turn was sampled after exactly what is trained before it.
    starts = [0, *(stop for _, stop in demonstration.given)]
    prompts = [request.prompts[0] for request in sampler.requests]
    assert prompts == [example.prompt_ids + rollout.completion_ids[:start] for start in starts]


def ids_of(tokenizer: Any, text: str) -> TokenIds:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


TOKENIZER: Any = family("qwen2_5")
PROMPT = (65, 66)
CALLING = ids_of(TOKENIZER, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>')
DONE = ids_of(TOKENIZER, "done<|im_end|>")


def test_rollouts_of_one_prompt_go_their_own_ways() -> None:
    """The second of three calls no tool, the third one twice; seeds are by rollout and turn."""
    ways = {0: [CALLING, DONE], 1: [DONE], 2: [CALLING, CALLING, DONE]}
    known: dict[TokenIds, int] = {}

    def turn(prompt: TokenIds, number: int) -> TokenIds:
        if prompt == PROMPT:
            return ways[number][0]
        # Rollouts 0 and 2 have the same second prompt: the first request for it is that of rollout 0.
        seen = known[prompt] = known.get(prompt, 0) + 1
        if prompt.count(CALLING[-1]) > 3:
            return ways[2][2]
        return ways[0][1] if seen == 1 else ways[2][1]

    sampler = Scripted(turn=turn)
    request = SampleRequest(prompts=[PROMPT], seeds=[7], num_generations=3)
    (group,) = sample_trajectories(sampler, request, toolbox(TOKENIZER), max_completion_length=1000)
    assert [r.tool_use.calls for r in group] == [1, 0, 2]
    assert [len(r.given) for r in group] == [1, 0, 2]
    assert group[1].completion_ids == DONE
    assert [list(r.seeds) for r in sampler.requests[1:]] == [
        [derive_seed(7, "turn", 0, 0), derive_seed(7, "turn", 0, 2)],
        [derive_seed(7, "turn", 1, 2)],
    ]


def test_the_limit_is_that_of_all_turns_and_results() -> None:
    whole, _ = sampled([CALLING, DONE], PROMPT, toolbox(TOKENIZER))
    length, (start, stop) = len(whole.completion_ids), whole.given[0]
    same, sampler = sampled([CALLING, DONE], PROMPT, toolbox(TOKENIZER), most=length)
    assert same.completion_ids == whole.completion_ids
    assert same.finish_reason == "stop"
    assert sampler.requests[1].max_completion_length == length - stop
    cut, _ = sampled([CALLING, DONE], PROMPT, toolbox(TOKENIZER), most=length - 1)
    assert cut.completion_ids == whole.completion_ids[:-1]
    assert (cut.finish_reason, cut.given) == ("length", whole.given)
    for most in (stop, start):  # no room for a token after the result
        without, _ = sampled([CALLING], PROMPT, toolbox(TOKENIZER), most=most)
        assert without.completion_ids == CALLING
        assert (without.finish_reason, without.given) == ("length", ())
        assert [m["role"] for m in without.messages] == ["assistant"]
    begun, _ = sampled([CALLING[:-1]], PROMPT, toolbox(TOKENIZER), most=start - 1)
    assert begun.completion_ids == CALLING[:-1]
    # A truncated turn is a message too: reward functions get messages for every rollout with tools.
    assert [m["role"] for m in begun.messages] == ["assistant"]
    assert [m["role"] for m in cut.messages] == ["assistant", "tool", "assistant"]
    assert (cut.messages[-1]["content"], whole.messages[-1]["content"]) == ("done", "done")
    shorter, _ = sampled([CALLING, DONE], PROMPT, toolbox(TOKENIZER), most=length - 2)
    assert shorter.messages[-1] == {"role": "assistant", "content": "don"}


def test_after_the_last_iteration_calls_are_not_answered() -> None:
    for most in (0, 1, 2):
        CALLS.clear()
        rollout, _ = sampled([CALLING] * (most + 1), PROMPT, toolbox(TOKENIZER, max_iterations=most))
        assert rollout.tool_use == ToolUse(calls=most, unanswered=1)
        assert len(CALLS) == len(rollout.given) == most
        assert rollout.completion_ids[-len(CALLING) :] == CALLING
        assert rollout.messages[-1]["tool_calls"]
        assert rollout.finish_reason == "stop"


def test_failing_and_malformed_calls() -> None:
    wrong = ids_of(TOKENIZER, '<tool_call>{"name": "sub", "arguments": {}}</tool_call><|im_end|>')
    odd = ids_of(TOKENIZER, '<tool_call>{"name": </tool_call><|im_end|>')
    rollout, _ = sampled([wrong, odd], PROMPT, toolbox(TOKENIZER))
    assert rollout.tool_use == ToolUse(calls=1, failures=(0,), malformed=1)
    assert "there is no tool 'sub'" in rollout.messages[1]["content"]
    assert rollout.completion_ids[-len(odd) :] == odd, "a malformed call ends the rollout"


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("tool", ["user", "e", "{eos}", "no tool\n", ""])
def test_the_policy_may_write_any_name(name: str, tool: str) -> None:
    """The name occurs in what the template writes, or is nothing: the results are those of any other call."""
    tokenizer: Any = family(name)
    tools = toolbox(tokenizer)
    called = tool.format(eos=tokenizer.eos_token)
    answers = [{"role": "tool", "name": "x", "content": "5"}]
    between = [
        encode_results(tools.form.results([{"function": {"name": one}}], answers), tokenizer, tools.stop_ids)
        for one in (called, "other")
    ]
    if name == "gemma4_v5":  # its results name the function
        assert tokenizer.decode(list(between[1])).startswith("response:other{")
    else:
        assert between[0] == between[1]


def test_failed_calls_are_counted_over_all_turns() -> None:
    """Calls 1 and 2 of two turns fail: the second of the first turn and the first of the next."""
    good = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    bad = good.replace("add", "x")
    turns = [ids_of(TOKENIZER, text + "<|im_end|>") for text in (good + bad, bad + good)]
    rollout, _ = sampled([*turns, DONE], PROMPT, toolbox(TOKENIZER))
    assert rollout.tool_use == ToolUse(calls=4, failures=(1, 2))
    assert rollout.tool_use.failed == 2


def test_rollouts_of_the_next_step_survive_a_save() -> None:
    """A checkpoint has them as JSON; messages, masks and failed calls are restored."""
    bad = ids_of(TOKENIZER, '<tool_call>{"name": "x", "arguments": {}}</tool_call><|im_end|>')
    rollout, _ = sampled([bad, CALLING, DONE], PROMPT, toolbox(TOKENIZER))
    assert (rollout.tool_use.failures, len(rollout.messages), len(rollout.given)) == ((0,), 5, 2)
    sampler: Any = SimpleNamespace(settings=SimpleNamespace(as_json=dict))
    ranks = Accelerator(cpu=True)
    ready: dict[tuple[TokenIds, int], tuple[Rollout, ...]] = {(PROMPT, 7): (rollout,)}
    saved = OneStepOffSampler(sampler=sampler, accelerator=ranks, ready=ready).state()
    again = OneStepOffSampler(sampler=sampler, accelerator=ranks)
    again.load(json.loads(json.dumps(saved)))
    assert again.ready == ready


@pytest.mark.parametrize("name", [name for name in READ if name != "gemma4_v5"])
def test_the_end_token_follows_a_turn_that_a_stop_string_ended(name: str) -> None:
    """The policy stopped before the end token that the template writes; it is a part of what is given."""
    tokenizer: Any = family(name)
    tools = toolbox(tokenizer)
    text = tools.form.completion([USER], call(1, 2)).rstrip().removesuffix(tokenizer.eos_token).rstrip("\n")
    stopped, eos = ids_of(tokenizer, text), tokenizer.eos_token_id
    assert stopped[-1] != eos
    done = (*ids_of(tokenizer, "3"), eos)
    ended, _ = sampled([(*stopped, eos), done], PROMPT, tools)
    rollout, _ = sampled([stopped, done], PROMPT, tools)
    assert rollout.completion_ids[: len(stopped)] == stopped
    if name == "glm4moe":  # `<|observation|>` ends the turn and begins the results
        assert ended.completion_ids == (*stopped, eos, *rollout.completion_ids[len(stopped) :])
    else:
        assert rollout.completion_ids == ended.completion_ids
        assert rollout.given == ((len(stopped), ended.given[0][1]),)


def test_after_a_call_that_hangs_the_others_of_the_turn_are_not_called() -> None:
    def wait() -> None:
        """Wait."""
        threading.Event().wait(60)

    text = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    turn = ids_of(TOKENIZER, text % ("wait", "{}") + (text % ("add", '{"a": 1, "b": 2}')) * 2 + "<|im_end|>")
    box = toolbox(TOKENIZER, tools={"add": tool_of(add), "wait": tool_of(wait)}, timeout=0.1)
    CALLS.clear()
    rollout, _ = sampled([turn, CALLING, DONE], PROMPT, box)
    assert CALLS == [(1, 2)], "only in the next turn"
    assert rollout.tool_use == ToolUse(calls=4, failures=(0, 1, 2))
    results = [m["content"] for m in rollout.messages if m["role"] == "tool"]
    assert "did not answer within 0.1 s" in results[0]
    assert "'add' was not called" in results[1]
    assert results[1] == results[2]
    assert results[3] == "3"


def test_two_calls_in_one_turn_have_their_results_in_order() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": %d, "b": 0}}</tool_call>'
    both = ids_of(TOKENIZER, text % 4 + text % 5 + "<|im_end|>")
    rollout, _ = sampled([both, DONE], PROMPT, toolbox(TOKENIZER))
    assert [m["content"] for m in rollout.messages] == [rollout.messages[0]["content"], "4", "5", "done"]
    shown = str(TOKENIZER.decode(list(rollout.completion_ids)))
    assert shown.index("<tool_response>\n4") < shown.index("<tool_response>\n5")
