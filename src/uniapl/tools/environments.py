"""Environments: objects that keep the state of one rollout, and whose methods the policy calls.

The contract is that of TRL's `environment_factory` (trl/trainer/grpo_trainer.py of TRL 1.16).
"""

import asyncio
import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from uniapl.config import DataConfig, RolloutConfig
from uniapl.data.rows import Dataset, columns_of_rows, tokenize_rows
from uniapl.errors import UsageError
from uniapl.rewards.base import Once, here
from uniapl.rewards.calls import FailedStart, is_async
from uniapl.rewards.event_loop import RewardTimeoutError
from uniapl.rewards.finding import find_function
from uniapl.rollout import Methods
from uniapl.threads import DeadlineError, call_with_deadline, map_in_threads
from uniapl.tools.functions import Tool, awaited, find_tools, tool_of
from uniapl.types import EpisodeStart, Example

OWN = ("reset", "get_reward")
"""Methods that the trainer calls, and the policy does not."""
THREADS = 32
"""Instances that are made at the same time. Our choice."""


class Episode(NamedTuple):
    """The environment of one rollout."""

    environment: Any
    """The instance, or a :class:`FailedStart` if it could not be made or reset."""
    methods: Methods
    """They call the instance one after the other."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment class, or a function that returns instances."""

    name: str
    make: Callable[[], Any]
    tools: tuple[Tool, ...]
    """The methods that the policy can call, as described to it; their functions belong to no instance."""
    reward: Callable[..., Any] | None
    """The reward function that calls `get_reward`, if the class has it."""
    timeout: float
    """Seconds to make an instance, and seconds for its `reset`."""

    def observations(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str | None]:
        """What `reset` of a fresh instance returns for each row.

        Args:
            rows: Numbers of rows, and their columns.

        Raises:
            UsageError: An instance could not be made or reset, or `reset` returned something else than text.
        """

        def observed(row: tuple[int, Mapping[str, Any]]) -> str | None:
            try:
                return self._begun(row[1])[1]
            except FailedStart as error:
                raise UsageError(f"row {row[0]}: {error}") from error

        return map_in_threads(observed, rows, num_threads=THREADS)

    def episodes(self, examples: Sequence[Example], count: int) -> list[list[Episode]]:
        """`count` fresh instances for each row, after their `reset`.

        Raises:
            UsageError: `reset` returned another text than before training.
        """
        each = [example for example in examples for _ in range(count)]
        found = map_in_threads(self._episode, each, num_threads=THREADS)
        return [found[start : start + count] for start in range(0, len(found), count)]

    def instances(self, examples: Sequence[Example]) -> list[Any]:
        """One fresh instance for each row, or a :class:`FailedStart` in its place."""
        return [episode.environment for (episode,) in self.episodes(examples, 1)]

    def _episode(self, example: Example) -> Episode:
        start = example.episode
        assert start is not None, "the row was tokenized without the environment"
        try:
            instance, text = self._begun(start.columns)
        except FailedStart as error:
            # The policy reads the error if it calls a method.
            return Episode(error, {tool.name: functools.partial(_raise, error) for tool in self.tools})
        if (text or None) != (start.observation or None):
            raise UsageError(
                f"row {example.row}: `reset` of environment '{self.name}' returned {text!r:.80}, and before "
                f"training {start.observation!r:.80}; all rollouts of a row share one prompt, so it must be "
                "deterministic: seed random numbers by a column"
            )
        lock = threading.Lock()
        return Episode(
            instance, {tool.name: _one_at_a_time(getattr(instance, tool.name), lock) for tool in self.tools}
        )

    def _begun(self, columns: Mapping[str, Any]) -> tuple[Any, str | None]:
        """A fresh instance, and what its `reset` returned; raises FailedStart."""
        instance = _made(self.name, self.make, self.timeout)
        with _failing(self.name, "`reset`", self.timeout):
            # Copied, so that a `reset` that modifies its arguments does not modify the data.
            arguments = copy.deepcopy(_accepted(instance.reset, columns))
            text = awaited(instance.reset, arguments, self.timeout, read=lambda value: value)
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise FailedStart(
                f"environment '{self.name}': `reset` returned {kind}; return text, which is appended to the "
                "prompt, or None"
            )
        return instance, text


@dataclass(kw_only=True)
class Episodes:
    """The environments of the rollouts of some prompts."""

    environment: Environment
    examples: Sequence[Example]
    count: int
    """Rollouts per prompt."""
    started: list[list[Episode]] = field(default_factory=list[list[Episode]])

    def begin(self) -> list[list[Methods]]:
        """Replace all instances by fresh ones, and return their methods. See :class:`SampleRequest`.

        Raises:
            UsageError: See :meth:`Environment.episodes`.
        """
        self.started = self.environment.episodes(self.examples, self.count)
        return [[episode.methods for episode in group] for group in self.started]

    @property
    def instances(self) -> list[tuple[Any, ...]]:
        """The environment of each rollout of each prompt."""
        return [tuple(episode.environment for episode in group) for group in self.started]


class Toolset(NamedTuple):
    """All that the policy can call."""

    tools: tuple[Tool, ...]
    """Functions, and the methods of the environment."""
    environment: Environment | None

    def tokenize(
        self,
        rows: Sequence[tuple[int, Any]],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        once: Once = here,
        **limits: Any,
    ) -> Dataset:
        """:func:`tokenize_rows` with the schemas of the tools and the texts of the environment's `reset`.

        Args:
            once: Calls `reset` in one of several processes.
            limits: Arguments of :func:`tokenize_rows`.

        Raises:
            UsageError: As there, or `reset` failed for a row.
        """
        episodes: dict[int, EpisodeStart] = {}
        if self.environment is not None:
            columns = columns_of_rows(rows, config)
            texts = once(functools.partial(self.environment.observations, columns))
            episodes = {
                number: EpisodeStart(values, text)
                for (number, values), text in zip(columns, texts, strict=True)
            }
        schemas = [dict(tool.schema) for tool in self.tools]
        return tokenize_rows(rows, tokenizer, config, tools=schemas, episodes=episodes, **limits)

    @property
    def rewards(self) -> list[Callable[..., Any]]:
        """The environment's reward function, if it has one."""
        return [self.environment.reward] if self.environment and self.environment.reward else []

    @property
    def instances(self) -> Callable[[Sequence[Example]], list[Any]] | None:
        """Makes instances for rows."""
        return self.environment.instances if self.environment else None


def find_toolset(rollout: RolloutConfig) -> Toolset:
    """The tools and the environment of a configuration.

    Raises:
        UsageError: One does not exist or cannot be described, or two tools have the same name.
    """
    tools = find_tools(rollout.tools)
    if rollout.environment is None:
        return Toolset(tuple(tools), None)
    environment = find_environment(rollout.environment, timeout=rollout.tool_timeout)
    taken = {*OWN, *(tool.name for tool in environment.tools)}
    if twice := next((tool.name for tool in tools if tool.name in taken), None):
        raise UsageError(
            f"rollout.tools: '{twice}' is also a method of environment '{environment.name}'; rename one"
        )
    return Toolset((*tools, *environment.tools), environment)


def find_environment(name: str, *, timeout: float) -> Environment:
    """The environment at `module:Class` or `path.py:Class`.

    Raises:
        UsageError: It does not exist, cannot be made without arguments, has no `reset` or no other public
            method, or a method cannot be described.
    """
    make = find_function(name, kind="environment")
    label = f"environment '{name}'"
    if missing := _required(make):
        raise UsageError(
            f"{label}: it is called without arguments, but '{missing[0]}' has no default; use a class whose "
            "`__init__` needs no argument"
        )
    try:
        instance = _made(name, make, timeout)
    except FailedStart as error:
        raise UsageError(str(error)) from error
    # The class's, as in TRL: reading the attributes of an instance would evaluate its properties.
    members = [member for member, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    if "reset" not in members:
        raise UsageError(
            f"{label}: {type(instance).__name__} has no method `reset(self, **kwargs)`, which gets the row's "
            "columns and returns None or text for the prompt"
        )
    if any(p.kind is p.POSITIONAL_ONLY for p in inspect.signature(instance.reset).parameters.values()):
        raise UsageError(f"{label}: `reset` gets columns by name; remove '/' from its parameters")
    if "get_reward" in members and (missing := _required(instance.get_reward)):
        raise UsageError(f"{label}: `get_reward` is called without arguments, but '{missing[0]}' needs one")
    public = [member for member in members if member not in OWN and not member.startswith("_")]
    if not public:
        raise UsageError(
            f"{label}: {type(instance).__name__} has no public method besides `reset` that the policy "
            "could call; add one"
        )
    try:
        tools = [tool_of(getattr(instance, member)) for member in public]
    except UsageError as error:
        raise UsageError(f"{label}: {error}; begin the name of a method that is no tool with '_'") from error
    return Environment(
        name=name,
        make=make,
        tools=tuple(replace(tool, function=_without_instance) for tool in tools),
        reward=_reward_of(instance) if "get_reward" in members else None,
        timeout=timeout,
    )


def _made(name: str, make: Callable[[], Any], timeout: float) -> Any:
    with _failing(name, "making an instance", timeout):
        return call_with_deadline(make, timeout)


@contextlib.contextmanager
def _failing(name: str, step: str, timeout: float) -> Iterator[None]:
    """Raises FailedStart with the environment's name and the step for every error but Ctrl-C."""
    try:
        yield
    except (DeadlineError, RewardTimeoutError) as error:
        late = f"{step} did not return within {timeout:g} s (rollout.tool_timeout)"
        raise FailedStart(f"environment '{name}': {late}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise FailedStart(f"environment '{name}': {step} failed: {error!r:.300}") from error


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built-in classes
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def _accepted(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that `reset` takes, as reward functions get theirs: all if it has ``**kwargs``.

    Raises:
        TypeError: A parameter without a default is no column.
    """
    if missing := [name for name in _required(function) if name not in columns]:
        known = ", ".join(sorted(columns))
        raise TypeError(f"it needs '{missing[0]}', which is no column of the data; columns: {known:.200}")
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(columns)
    return {name: value for name, value in columns.items() if name in parameters}


def _reward_of(instance: Any) -> Callable[..., Any]:
    """TRL's reward function for `get_reward`, which calls it once for each rollout."""

    def get_reward(environments: list[Any]) -> list[Any]:
        return [_value_or_error(environment.get_reward) for environment in environments]

    async def get_reward_async(environments: list[Any]) -> list[Any]:
        calls = [environment.get_reward() for environment in environments]
        return await asyncio.gather(*calls, return_exceptions=True)

    function = get_reward_async if is_async(instance.get_reward) else get_reward
    function.__name__ = type(instance).__name__
    return function


def _value_or_error(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # the user's code may raise anything
        return error


def _one_at_a_time(method: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    """The method, which raises an error while an earlier call of the instance still runs after its limit."""

    @functools.wraps(method)
    def call(**arguments: Any) -> Any:
        with _held(lock):
            return method(**arguments)

    @functools.wraps(method)
    async def call_async(**arguments: Any) -> Any:
        with _held(lock):
            return await method(**arguments)

    return call_async if is_async(method) else call


@contextlib.contextmanager
def _held(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        raise RuntimeError("an earlier call has not returned yet")
    try:
        yield
    finally:
        lock.release()


def _raise(error: Exception, /, **_: Any) -> None:
    raise error


def _without_instance(**_: Any) -> None:
    raise RuntimeError("the method of an environment was called in a rollout without one")
