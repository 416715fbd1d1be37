"""Environments: TRL's contract, whose instance a call reaches, and what bad ones are refused with."""

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.templates import family
from uniapl.config import DataConfig, RewardsConfig
from uniapl.config.resolve import resolve
from uniapl.config.rollout import RolloutConfig
from uniapl.data.rendering import ChatTemplate
from uniapl.errors import UsageError
from uniapl.rewards.base import build_rewarder
from uniapl.rollout import SampleRequest
from uniapl.tools.calls import CallParser
from uniapl.tools.environments import Environment, Episodes, Toolset, find_environment, find_toolset
from uniapl.tools.functions import Tool, call_tool
from uniapl.tools.trajectories import Toolbox, sample_trajectories
from uniapl.training.build_sampler import check_processes
from uniapl.training.preflight.checks import check_tools
from uniapl.types import Example, Rollout, TokenIds

GOOD = '''
import asyncio

class Counter:
    """A counter that begins at the row's number."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.calls = []

    def reset(self, **kwargs):
        self.columns = kwargs
        self.value = kwargs["start"]
        return f" The counter is at {self.value}."

    def increase(self, by: int) -> int:
        """Increase the counter.

        Args:
            by: How much.

        Returns:
            Its value.
        """
        self.value += by
        self.calls.append(by)
        return self.value

    async def read(self) -> int:
        """Read the counter."""
        await asyncio.sleep(0)
        return self.value

    @staticmethod
    def double(x: int) -> int:
        """Double a number.

        Args:
            x: The number.
        """
        return 2 * x

    @classmethod
    def other(cls): ...

    @property
    def broken(self):
        raise AttributeError("a property is no tool")

    def _hidden(self): ...

    def get_reward(self) -> float:
        return float(self.value)
'''
METHOD = '''
    def act(self) -> int:
        """Act."""
        return 1
'''
TOKENIZER: Any = family("qwen2_5")
ROWS = [
    (1, {"prompt": [{"role": "user", "content": "Count."}], "start": 3, "note": "x"}),
    (2, {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Go."}], "start": 50}),
]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Environment]:
    """Write a source to a file of its own, and find the class in it."""

    def write(source: str, name: str = "E", timeout: float = 5.0) -> Environment:
        path = tmp_path / f"env_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        return find_environment(f"{path}:{name}", timeout=timeout)

    return write


def tokenized(environment: Environment, rows: Any = None, **config: Any) -> tuple[Example, ...]:
    rows = ROWS if rows is None else rows
    return Toolset(environment.tools, environment).tokenize(rows, TOKENIZER, DataConfig(**config)).examples


def class_of(environment: Environment) -> Any:
    return environment.make


def test_the_methods_of_a_class_are_its_tools(written: Callable[..., Environment]) -> None:
    environment = written(GOOD, "Counter")
    schemas = {tool.name: tool.schema["function"] for tool in environment.tools}
    assert list(schemas) == ["double", "increase", "read"]
    assert schemas["increase"]["parameters"]["properties"] == {
        "by": {"type": "integer", "description": "How much."}
    }
    assert schemas["read"] == {
        "name": "read",
        "description": "Read the counter.",
        "parameters": {"type": "object", "properties": {}},
        "return": {"type": "integer"},
    }


def test_the_text_of_reset_ends_the_prompt_of_expert_and_policy(
    written: Callable[..., Environment],
) -> None:
    """As if the row had the text itself; `reset` gets all columns as they are in the row."""
    environment = written(GOOD, "Counter")
    shown = [{"role": "assistant", "content": "done"}]
    rows = [(1, {**ROWS[0][1], "completion": shown}), ROWS[1]]
    examples = tokenized(environment, rows)
    appended = [
        (1, {"prompt": [{"role": "user", "content": "Count. The counter is at 3."}], "completion": shown}),
        (
            2,
            {
                "prompt": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Go. The counter is at 50."},
                ]
            },
        ),
    ]
    plain = Toolset(environment.tools, None).tokenize(appended, TOKENIZER, DataConfig()).examples
    assert [e.prompt_ids for e in examples] == [e.prompt_ids for e in plain]
    assert [e.prompt for e in examples] == [e.prompt for e in plain]
    assert [e.demonstration_ids for e in examples] == [e.demonstration_ids for e in plain]
    ((episode,), (other,)) = environment.episodes(examples, 1)
    assert episode.environment.columns == rows[0][1]
    assert other.environment.columns == {**ROWS[1][1], "note": None, "completion": None}
    (of_messages,) = tokenized(environment, [(1, {"messages": [*ROWS[0][1]["prompt"], *shown], "start": 3})])
    assert of_messages.prompt_ids == examples[0].prompt_ids
    assert of_messages.demonstration_ids == examples[0].demonstration_ids


def test_columns_reach_reset_by_name(written: Callable[..., Environment]) -> None:
    """Renamed ones under both names; a `reset` that names its columns gets no others."""
    environment = written(
        "class E:\n    def reset(self, start, note=7, begin=None):\n"
        f"        return f'{{start}}{{note}}{{begin}}'\n{METHOD}"
    )
    row = {"prompt": [{"role": "user", "content": "-"}], "begin": 4}
    (example,) = tokenized(environment, [(1, row)], columns={"begin": "start"})
    assert example.prompt == [{"role": "user", "content": "-474"}]
    modest = written(f"class E:\n    def reset(self): ...\n{METHOD}")
    (example,) = tokenized(modest, [(1, row)])
    assert example.prompt == row["prompt"]


def test_a_reset_cannot_modify_the_data(written: Callable[..., Environment]) -> None:
    source = (
        f"class E:\n    def reset(self, prompt, **rest):\n        prompt[0]['content'] = 'changed'\n{METHOD}"
    )
    rows = [(1, {"prompt": [{"role": "user", "content": "Hi"}]})]
    environment = written(source)
    examples = tokenized(environment, rows)
    environment.episodes(examples, 2)
    assert rows == [(1, {"prompt": [{"role": "user", "content": "Hi"}]})]
    assert examples[0].prompt == [{"role": "user", "content": "Hi"}]


def test_the_environment_may_own_the_prompt(written: Callable[..., Environment]) -> None:
    """As in TRL, a row needs no prompt then."""
    (example,) = tokenized(written(GOOD, "Counter"), [(1, {"start": 3})])
    assert example.prompt == [{"role": "user", "content": " The counter is at 3."}]
    silent = written(f"class E:\n    def reset(self, **kwargs): ...\n{METHOD}")
    with pytest.raises(UsageError, match="row 1: no 'prompt'"):
        tokenized(silent, [(1, {"start": 3})])


def ids_of(text: str) -> TokenIds:
    return tuple(TOKENIZER(text, add_special_tokens=False).input_ids)


def turn(name: str, **arguments: Any) -> TokenIds:
    call = json.dumps({"name": name, "arguments": arguments})
    return ids_of(f"<tool_call>{call}</tool_call><|im_end|>")


DONE = ids_of("done<|im_end|>")


@dataclass
class Counting:
    """Rollout n of a prompt increases its counter n times by n + 1, with a turn for each."""

    requests: list[SampleRequest] = field(default_factory=list)

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        self.requests.append(request)
        return [
            tuple(self._rollout(prompt, number) for number in range(request.num_generations))
            for prompt in request.prompts
        ]

    def _rollout(self, prompt: TokenIds, number: int) -> Rollout:
        trajectory = str(TOKENIZER.decode(list(prompt))).partition("The counter is at")[2]
        done = trajectory.count("</tool_call>")
        by = int(trajectory.rpartition('"by": ')[2][0]) if done else number + 1
        ids = turn("increase", by=by) if done < by - 1 else DONE
        return Rollout(
            completion_ids=ids,
            sampling_logprobs=(-1.0,) * len(ids),
            finish_reason="stop",
            policy_version=0,
        )

    def check(self) -> None: ...


def sampled(environment: Environment, examples: Any) -> tuple[Any, Any]:
    """Three rollouts of each prompt, and their environments."""
    episodes = Episodes(environment=environment, examples=examples, count=3)
    form = ChatTemplate(
        tokenizer=TOKENIZER, arguments={}, tools=[dict(tool.schema) for tool in environment.tools]
    )
    stop_ids = {TOKENIZER.eos_token_id}
    toolbox = Toolbox(
        tools={tool.name: tool for tool in environment.tools},
        parser=CallParser.of(form, stop_ids),
        form=form,
        stop_ids=stop_ids,
        max_iterations=5,
        timeout=5.0,
        max_characters=200,
    )
    sampler = Counting()
    request = SampleRequest(
        prompts=[example.prompt_ids for example in examples],
        seeds=[example.row for example in examples],
        num_generations=3,
        begin=episodes.begin,
    )
    groups = sample_trajectories(sampler, request, toolbox, max_completion_length=5000)
    pickle.dumps(sampler.requests)  # they are sent to other processes
    return groups, episodes.instances


def test_each_rollout_has_its_own_instance(written: Callable[..., Environment]) -> None:
    environment = written(GOOD, "Counter")
    examples = tokenized(environment)
    groups, instances = sampled(environment, examples)
    assert [[one.calls for one in group] for group in instances] == [[[], [2], [3, 3]]] * 2
    assert [[one.value for one in group] for group in instances] == [[3, 5, 9], [50, 52, 56]]
    # What the policy read are the values of its own instance.
    read = [[[m["content"] for m in r.messages if m["role"] == "tool"] for r in group] for group in groups]
    assert read == [[[], ["5"], ["6", "9"]], [[], ["52"], ["53", "56"]]]
    assert len({id(one) for group in instances for one in group}) == 6
    # The other prompts of a batch, and their order, change nothing.
    back, _ = sampled(environment, examples[::-1])
    strip = [[(r.completion_ids, r.given, r.messages) for r in group] for group in groups]
    assert [[(r.completion_ids, r.given, r.messages) for r in group] for group in back[::-1]] == strip


def test_instances_are_fresh(written: Callable[..., Environment]) -> None:
    environment = written(GOOD, "Counter")
    examples = tokenized(environment)
    before = class_of(environment).made
    first = environment.episodes(examples, 2)
    first[0][0].methods["increase"](by=5)
    second = environment.episodes(examples, 2)
    assert class_of(environment).made == before + 8
    assert [e.environment.value for group in second for e in group] == [3, 3, 50, 50]


def called(methods: Any, name: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
    tool = Tool(name=name, function=methods[name], schema={})
    return call_tool({name: tool}, name, arguments, timeout=timeout, max_characters=400)


def test_async_and_static_methods(written: Callable[..., Environment]) -> None:
    environment = written(GOOD.replace("def reset", "async def reset"), "Counter")
    ((episode,), _) = environment.episodes(tokenized(environment), 1)
    assert called(episode.methods, "read").content == "3"
    assert called(episode.methods, "double", x=4).content == "8"
    assert "unexpected keyword argument 'y'" in called(episode.methods, "double", x=4, y=4).content


@pytest.mark.parametrize("prefix", ["", "async "])
def test_calls_of_an_instance_do_not_overlap(prefix: str, written: Callable[..., Environment]) -> None:
    """After a call that hangs, no other call changes the instance at the same time."""
    source = f'''
import time
class E:
    def reset(self, **kwargs): ...
    def hang(self) -> int:
        """Hang."""
        time.sleep(1.0)
        return 1
    {prefix}def act(self) -> int:
        """Act."""
        return 2
'''
    environment = written(source)
    ((one, other),) = environment.episodes(tokenized(environment, ROWS[:1]), 2)
    assert "did not answer within 0.1 s" in called(one.methods, "hang", timeout=0.1).content
    assert "an earlier call has not returned yet" in called(one.methods, "act").content
    assert called(other.methods, "act").content == "2"
    time.sleep(1.2)
    assert called(one.methods, "act").content == "2"


FLAKY = f"""
import pathlib, time, sys
class E:
    def reset(self, **kwargs):
        if pathlib.Path({{flag!r}}).exists():
            {{what}}
        self.value = 1
{METHOD}
    def get_reward(self):
        return self.value
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise ConnectionError('refused')", r"`reset` failed: ConnectionError\('refused'\)"),
        ("sys.exit(3)", r"`reset` failed: RuntimeError\('SystemExit\(3\)'\)"),
        ("time.sleep(60)", "`reset` did not return within 0.5 s"),
        ("return 5", "`reset` returned int"),
    ],
)
def test_a_reset_that_fails_in_a_rollout(
    what: str, message: str, written: Callable[..., Environment], tmp_path: Path
) -> None:
    """The reward of that rollout is unknown and never 0; the policy reads why its calls fail."""
    flag = tmp_path / "flag"
    environment = written(FLAKY.format(flag=str(flag), what=what), timeout=0.5)
    (example,) = tokenized(environment, ROWS[:1])
    flag.touch()
    ((failing,),) = environment.episodes([example], 1)
    flag.unlink()
    ((good,),) = environment.episodes([example], 1)
    result = called(failing.methods, "act", error=1)
    assert result.failed
    assert message.replace("\\", "") in result.content
    calls: list[int] = []

    def counted(completions: Any, environments: Any) -> list[float]:
        calls.append(len(environments))
        return [float(one.value) for one in environments]

    functions = [counted, *Toolset((), environment).rewards]
    rewarder = build_rewarder(RewardsConfig(), functions, start=environment.instances)
    environments = [failing.environment, good.environment]
    outcomes = rewarder.score([example] * 2, ["a"] * 2, [(1,)] * 2, environments)
    assert list(outcomes) == ["counted", "E"]
    for outcome in outcomes.values():
        assert outcome.values == [None, 1.0]
        assert outcome.failed == [True, False]
        assert message.replace("\\", "") in str(outcome.message)
    assert rewarder.combine(outcomes, 2) == [None, 2.0]
    assert calls == [1]


def test_a_reset_that_is_not_deterministic_is_refused(written: Callable[..., Environment]) -> None:
    source = "class E:\n    n = 0\n    def reset(self, **kw):\n        E.n += 1\n        return f'#{E.n}'"
    environment = written(f"{source}\n{METHOD}")
    (example,) = tokenized(environment, ROWS[:1])
    with pytest.raises(
        UsageError,
        match=r"row 1: `reset` of environment '.*:E' returned '#2', .* training '#1'; .* deterministic",
    ):
        environment.episodes([example], 1)


def test_rewards_read_the_instances(written: Callable[..., Environment]) -> None:
    """`get_reward` is one more reward with weight 1, and is called once for each rollout."""
    source = GOOD.replace(
        "        return float(self.value)",
        "        self.asked = getattr(self, 'asked', 0) + 1\n        return 1 / (self.value - 5)",
    )
    environment = written(source, "Counter")
    examples = tokenized(environment)
    instances = [one for group in sampled(environment, examples)[1] for one in group]

    def started(environments: list[Any], start: list[int], **rest: Any) -> list[float]:
        return [one.value - first for one, first in zip(environments, start, strict=True)]

    functions = [started, *Toolset((), environment).rewards]
    rewarder = build_rewarder(RewardsConfig(), functions, start=environment.instances)
    rewarder.check_columns(examples)
    assert all(rewarder.rewards[0].applies_to(example) for example in examples)
    rewarder.try_out(examples)
    rows = [example for example in examples for _ in range(3)]
    found = rewarder.score(rows, ["a"] * 6, [(1,)] * 6, instances)
    assert found["started"].values == [0, 2, 6, 0, 2, 6]
    assert found["Counter"].values == [-0.5, None, 0.25, *(1 / (x - 5) for x in (50, 52, 56))]
    assert "ZeroDivisionError" in str(found["Counter"].message)
    assert [one.asked for one in instances] == [1] * 6
    assert rewarder.weights == {"started": 1.0, "Counter": 1.0}
    # A completion that is no rollout has a fresh instance.
    assert rewarder.score(rows[:1], ["a"], [(1,)])["started"].values == [0]


def test_an_async_get_reward(written: Callable[..., Environment]) -> None:
    source = GOOD.replace("def get_reward", "async def get_reward").replace(
        "float(self.value)", "6 / (self.value - 3)"
    )
    environment = written(source, "Counter")
    examples = tokenized(environment)
    rewarder = build_rewarder(RewardsConfig(), Toolset((), environment).rewards, start=environment.instances)
    outcome = rewarder.score(examples, ["a"] * 2, [(1,)] * 2)["Counter"]
    assert outcome.values == [None, 6 / 47]
    assert "ZeroDivisionError" in str(outcome.message)


def test_a_reward_that_needs_environments_without_one() -> None:
    def takes(environments: list[Any]) -> list[float]:
        return [0.0 for _ in environments]

    rewarder = build_rewarder(RewardsConfig(), [takes])
    with pytest.raises(UsageError, match=r"'takes' takes 'environments', but .* set rollout.environment"):
        rewarder.check_columns([])


RESET = "    def reset(self, **kwargs): ...\n"
BAD: dict[str, tuple[str, str]] = {
    "not a class": ("E = 5", r"has no class 'E'"),
    "an instance": (f"class C:\n{RESET}{METHOD}\nE = C()", r"has no class 'E'; it defines: C"),
    "misspelt": (f"class Ee:\n{RESET}{METHOD}", r"has no class 'E'; it defines: Ee. Did you mean 'Ee'\?"),
    "the file raises": ("1 / 0", r"cannot import .*ZeroDivisionError"),
    "arguments": (
        f"class E:\n    def __init__(self, url): ...\n{RESET}{METHOD}",
        r"called without arguments, but 'url' has no default",
    ),
    "init raises": (
        f"class E:\n    def __init__(self):\n        raise OSError('no server')\n{RESET}{METHOD}",
        r"making an instance failed: OSError\('no server'\)",
    ),
    "init exits": (
        f"import sys\nclass E:\n    def __init__(self):\n        sys.exit(1)\n{RESET}{METHOD}",
        r"making an instance failed: SystemExit\(1\)",
    ),
    "init hangs": (
        f"import time\nclass E:\n    def __init__(self):\n        time.sleep(60)\n{RESET}{METHOD}",
        r"making an instance did not return within 0.3 s \(rollout.tool_timeout\)",
    ),
    "no reset": (f"class E:\n{METHOD}", r"E has no method `reset\(self, \*\*kwargs\)`"),
    "reset is no method": (f"class E:\n    reset = None\n{METHOD}", r"E has no method `reset"),
    "a function that returns nothing": ("def E(): ...", r"NoneType has no method `reset"),
    "positional reset": (
        f"class E:\n    def reset(self, start, /): ...\n{METHOD}",
        r"`reset` gets columns by name; remove '/'",
    ),
    "get_reward with arguments": (
        f"class E:\n{RESET}{METHOD}\n    def get_reward(self, text): ...",
        r"`get_reward` is called without arguments, but 'text' needs one",
    ),
    "no methods": (f"class E:\n{RESET}    def _act(self): ...", r"no public method besides `reset`"),
    "no docstring": (
        f"class E:\n{RESET}    def act(self) -> int: ...",
        r"tool 'act' cannot be described: .*name of a method that is no tool with '_'",
    ),
    "no hint": (
        f'class E:\n{RESET}    def act(self, x):\n        """Act.\n\n        Args:\n            x: X."""',
        r"tool 'act' cannot be described",
    ),
    "no description": (
        f'class E:\n{RESET}    def act(self, x: int):\n        """Act."""',
        r"tool 'act' cannot be described",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_environments_are_refused(kind: str, written: Callable[..., Environment]) -> None:
    source, message = BAD[kind]
    with pytest.raises(UsageError, match=message) as caught:
        written(source, timeout=0.3)
    assert "environment '" in str(caught.value)
    assert ":E'" in str(caught.value)


def test_an_environment_is_named_with_its_file() -> None:
    for wrong, message in {
        "Echo": "unknown environment 'Echo': use `module:Class` or `path.py:Class`",
        "nowhere.py:Echo": "environment 'nowhere.py:Echo': cannot import 'nowhere.py': .*file not found",
    }.items():
        with pytest.raises(UsageError, match=message):
            find_environment(wrong, timeout=1)


BAD_AT_LOAD: dict[str, tuple[str, str]] = {
    "reset raises": ("def reset(self, start, **kw):\n        1 / (start - 50)", "failed: ZeroDivisionError"),
    "reset exits": ("def reset(self, start, **kw):\n        start == 50 and exit(1)", "failed: .*SystemExit"),
    "reset hangs": (
        "def reset(self, start, **kw):\n        import time; start == 50 and time.sleep(60)",
        r"`reset` did not return within 0.3 s \(rollout.tool_timeout\)",
    ),
    "reset returns a list": (
        "def reset(self, start, **kw):\n        return [] if start == 50 else None",
        "`reset` returned list; return text, which is appended to the prompt, or None",
    ),
}


@pytest.mark.parametrize("kind", BAD_AT_LOAD)
def test_a_reset_that_fails_before_training_names_row_and_class(
    kind: str, written: Callable[..., Environment]
) -> None:
    reset, message = BAD_AT_LOAD[kind]
    environment = written(f"class E:\n    {reset}\n{METHOD}", timeout=0.3)
    with pytest.raises(UsageError, match=rf"row 2: environment '.*:E': .*{message}"):
        tokenized(environment)


def test_bad_rows_are_refused(written: Callable[..., Environment]) -> None:
    missing = written(f"class E:\n    def reset(self, answer): ...\n{METHOD}")
    with pytest.raises(
        UsageError,
        match=r"row 1: .*`reset` failed: .*needs 'answer', which is no column .*: note, prompt, start",
    ):
        tokenized(missing)
    counter = written(GOOD, "Counter")
    with pytest.raises(UsageError, match=r"row 1: the prompt is plain text, but rollout.tools .* chat"):
        tokenized(counter, [(1, {"prompt": "Hi", "start": 1})])
    (example,) = tokenized(counter, [(1, {"prompt": "Hi", "start": 1})], prompt_format="chat")
    assert example.prompt == "Hi The counter is at 1."
    with pytest.raises(UsageError, match=r"row 1: .*appended to the user's last message, but .* 'system'"):
        tokenized(counter, [(1, {"prompt": [{"role": "system", "content": "S"}], "start": 1})])
    with pytest.raises(UsageError, match="row 1: expected a mapping"):
        tokenized(counter, [(1, "text")])


def test_a_template_without_tools_is_refused(written: Callable[..., Environment]) -> None:
    environment = written(GOOD, "Counter")
    toolset = Toolset(environment.tools, environment)
    with pytest.raises(UsageError, match=r"does not render 'double' of 'tools'; .*rollout.environment"):
        toolset.tokenize(ROWS, family("smolvlm"), DataConfig())


def test_names_must_not_collide(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"{GOOD}\n"
        'def increase(by: int) -> int:\n    """Add.\n\n    Args:\n        by: B."""\n    return by\n'
        '\ndef reset() -> int:\n    """Reset."""\n    return 1\n'
        '\ndef free() -> int:\n    """Free."""\n    return 1\n'
    )
    mine = f"{tmp_path / 'mine.py'}"
    for name in ("increase", "reset"):
        with pytest.raises(UsageError, match=rf"rollout.tools: '{name}' is also a method of environment"):
            find_toolset(RolloutConfig(tools=(f"{mine}:{name}",), environment=f"{mine}:Counter"))
    both = find_toolset(RolloutConfig(tools=(f"{mine}:free",), environment=f"{mine}:Counter"))
    assert [tool.name for tool in both.tools] == ["free", "double", "increase", "read"]
    alone = find_toolset(RolloutConfig(tools=(f"{mine}:reset",)))
    assert [tool.name for tool in alone.tools] == ["reset"]


def test_a_request_that_is_sampled_again_has_fresh_instances(written: Callable[..., Environment]) -> None:
    """As after vLLM was lost in the middle of the rollouts."""
    environment = written(GOOD, "Counter")
    (example,) = tokenized(environment, ROWS[:1])
    episodes = Episodes(environment=environment, examples=[example], count=2)
    ((first, _),) = episodes.begin()
    first["increase"](by=4)
    episodes.begin()
    assert [[one.value for one in group] for group in episodes.instances] == [[3, 3]]


def test_settings_that_environments_exclude() -> None:
    with pytest.raises(UsageError, match="environment needs max_off_policy_steps 0"):
        resolve(
            {
                "method": "grpo",
                "output_dir": "x",
                "rollout": {
                    **{"environment": "a:B", "max_off_policy_steps": 1},
                    **{"sampler": "vllm", "vllm_mode": "server"},
                },
            }
        )
    config = resolve({"method": "grpo", "output_dir": "x", "rollout": {"environment": "a:B"}}).config
    served = {"environment": "a:B", "sampler": "vllm", "vllm_mode": "server"}
    on_server = resolve({"method": "grpo", "output_dir": "x", "rollout": served}).config
    check_processes(on_server, 1)
    check_processes(config, 2)
    with pytest.raises(UsageError, match=r"rollout.environment with rollout.sampler vllm is for one process"):
        check_processes(on_server, 2)
    # A stage without rollouts evaluates with the local sampler.
    check_processes(
        on_server.model_copy(update={"objective": resolve({"method": "sft"}).config.objective}), 2
    )
    other = config.model_copy(update={"rollout": RolloutConfig()})
    check_tools(config, [config, config])
    with pytest.raises(UsageError, match=r"stage 2 cannot change rollout.environment"):
        check_tools(config, [config, other])
    with pytest.raises(UsageError, match=r"environment_factory.*rollout.environment"):
        resolve({"method": "grpo", "output_dir": "x", "environment_factory": "a:B"})
