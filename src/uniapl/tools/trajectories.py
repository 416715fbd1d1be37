"""Rollouts of several turns: the policy calls tools, reads their results and goes on.

Token ids are never decoded and encoded again: a trajectory is the ids that were sampled, with those of the
results between them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from uniapl.data.conversations import Message, function_of
from uniapl.data.rendering import ChatTemplate
from uniapl.data.tokenization import encode_results
from uniapl.rollout import Methods, Sampler, SampleRequest
from uniapl.rollout.caches import RowCaches
from uniapl.threads import map_in_threads
from uniapl.tools.calls import CallParser
from uniapl.tools.functions import Tool, call_tool, not_called
from uniapl.types import Given, Rollout, TokenIds, ToolUse, derive_seed

THREADS = 32
"""Turns whose tools are called at the same time. Our choice."""


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """The tools of a rollout, and how calls and results are written."""

    tools: Mapping[str, Tool]
    parser: CallParser
    form: ChatTemplate
    stop_ids: Collection[int]
    max_iterations: int
    """Turns after which tools are called; a call in a later turn is not answered."""
    timeout: float
    """Seconds for a call."""
    max_characters: int
    """Of a result."""

    def answer(self, turn: TokenIds, *, calls: bool = True, methods: Methods | None = None) -> "Answer":
        """Call the tools that a turn calls in order, up to the first that does not return in time.

        Args:
            calls: Whether tools may still be called.
            methods: Tools of this rollout only, in place of those with the same names.
        """
        tools = dict(self.tools)
        for own, function in (methods or {}).items():
            tools[own] = replace(tools[own], function=function)
        found = self.parser.read(turn)
        message = self.message(turn)
        if not found.calls or not calls:
            message |= {"tool_calls": found.calls} if found.calls else {}
            use = ToolUse(malformed=int(found.malformed), unanswered=len(found.calls))
            return Answer(ids=(), messages=(message,), use=use)
        results: list[Message] = []
        failures: list[int] = []
        late = False
        for index, call in enumerate(found.calls):
            name, arguments = function_of(call)["name"], function_of(call).get("arguments", {})
            limits = {"timeout": self.timeout, "max_characters": self.max_characters}
            if late:
                result = not_called(name, self.max_characters)
            else:
                result = call_tool(tools, name, arguments, **limits)
            late = late or result.late
            failures += [index] if result.failed else []
            results.append({"role": "tool", "name": name, "content": result.content})
        rendered = self.form.results(found.calls, results)
        ended = turn[-1] in self.stop_ids
        ids = encode_results(rendered, self.form.tokenizer, self.stop_ids, ended=ended)
        # Some templates write the stop token of the turn as a part of the results.
        ids = ids[1:] if ids[0] == turn[-1] else ids
        message["tool_calls"] = found.calls
        use = ToolUse(calls=len(found.calls), failures=tuple(failures))
        return Answer(ids=ids, messages=(message, *results), use=use)

    def message(self, turn: TokenIds) -> Message:
        """A turn of the policy as a chat message, without its calls."""
        text = str(self.form.tokenizer.decode(list(turn), skip_special_tokens=True))
        return {"role": "assistant", "content": text}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What follows a turn of the policy."""

    ids: TokenIds
    """Token ids up to the beginning of the next turn; empty if the turn calls no tool."""
    messages: tuple[Message, ...]
    """The turn, and the results of its calls."""
    use: ToolUse


@dataclass(kw_only=True)
class _Trajectory:
    """A rollout that is being sampled."""

    prompt: TokenIds
    seed: int
    last: Rollout
    """Its last turn."""
    methods: Methods
    """Those of its environment."""
    ids: TokenIds = ()
    logprobs: tuple[float, ...] = ()
    given: Given = ()
    messages: tuple[Message, ...] = ()
    use: ToolUse = field(default_factory=ToolUse)
    truncated: bool = False

    def add(self, turn: Rollout, limit: int) -> None:
        """Append a turn; what exceeds the limit is cut."""
        room = limit - len(self.ids)
        self.last = replace(
            turn, completion_ids=turn.completion_ids[:room], sampling_logprobs=turn.sampling_logprobs[:room]
        )
        self.ids += self.last.completion_ids
        self.logprobs += self.last.sampling_logprobs
        self.truncated = turn.finish_reason == "length" or len(turn.completion_ids) > room

    def rollout(self) -> Rollout:
        """The trajectory as one rollout."""
        return replace(
            self.last,
            completion_ids=self.ids,
            sampling_logprobs=self.logprobs,
            given=self.given,
            finish_reason="length" if self.truncated else "stop",
            messages=self.messages,
            tool_use=self.use,
        )


def sample_trajectories(
    sampler: Sampler, request: SampleRequest, toolbox: Toolbox, *, max_completion_length: int
) -> list[tuple[Rollout, ...]]:
    """Sample turns until no rollout calls a tool.

    A rollout whose next result leaves no room for a token ends before the result, truncated, as in TRL.

    Args:
        max_completion_length: Tokens of all turns and results together.

    Returns:
        `num_generations` rollouts for each prompt, in the order of the prompts.
    """
    none: list[list[Methods]] = [[{}] * request.num_generations for _ in request.prompts]
    methods = request.begin() if request.begin else none
    # Instances of environments stay in this process.
    request = replace(request, begin=None, caches=RowCaches())
    groups = [
        [
            _Trajectory(prompt=prompt, seed=seed, last=rollout, methods=own)
            for rollout, own in zip(rollouts, methods_of_group, strict=True)
        ]
        for prompt, seed, rollouts, methods_of_group in zip(
            request.prompts, request.seeds, sampler.sample(request), methods, strict=True
        )
    ]
    everything = [one for group in groups for one in group]
    for one in everything:
        one.add(one.last, max_completion_length)
    active = everything
    for iteration in range(toolbox.max_iterations + 1):
        active = _answered(active, toolbox, max_completion_length, last=iteration == toolbox.max_iterations)
        if not active:
            break
        numbers = {id(one): number for group in groups for number, one in enumerate(group)}
        rooms = [max_completion_length - len(one.ids) for one in active]
        turns = sampler.sample(
            replace(
                request,
                prompts=[one.prompt + one.ids for one in active],
                seeds=[derive_seed(one.seed, "turn", iteration, numbers[id(one)]) for one in active],
                num_generations=1,
                max_completion_length=max(rooms),
                completion_lengths=rooms,
            )
        )
        for one, (turn,) in zip(active, turns, strict=True):
            one.add(turn, max_completion_length)
    return [tuple(one.rollout() for one in group) for group in groups]


def _answered(
    trajectories: Sequence[_Trajectory], toolbox: Toolbox, limit: int, *, last: bool
) -> list[_Trajectory]:
    """Append the last turns and the results of the tools that they call; return the trajectories that go on.

    A truncated turn calls no tool.

    Args:
        last: Calls are not answered any more.
    """
    ended = [one for one in trajectories if not one.truncated]
    for one in trajectories:
        if one.truncated:
            # Without it, the last message, which reward functions read, would be the result of a tool.
            start = one.given[-1][1] if one.given else 0
            one.messages += (toolbox.message(one.ids[start:]),)
    answers = map_in_threads(
        lambda one: toolbox.answer(one.last.completion_ids, calls=not last, methods=one.methods),
        ended,
        num_threads=THREADS,
    )
    going: list[_Trajectory] = []
    for one, answer in zip(ended, answers, strict=True):
        one.use = one.use + answer.use
        start, stop = len(one.ids), len(one.ids) + len(answer.ids)
        if not answer.ids:
            one.messages += answer.messages
        elif stop >= limit:
            one.messages += answer.messages[:1]
            one.truncated = True
        else:
            one.messages += answer.messages
            one.given = (*one.given, (start, stop))
            one.ids += answer.ids
            going.append(one)
    return going
