"""The registry of reward functions, finding them by name, calling them, and combining what they say."""

import asyncio
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from uniapl.errors import UsageError
from uniapl.types import Example

REGISTRY: dict[str, Callable[..., Any]] = {}
STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardFunction(Protocol):
    """TRL's signature; see the package's docstring."""

    def __call__(self, **kwargs: Any) -> Any:
        """One float or None per completion (or an awaitable of that)."""
        ...


class RewardTimeoutError(Exception):
    """A call did not end in time. (A TimeoutError may be the function's own, about one sample.)"""


class WrongFormError(ValueError):
    """A reward function returned something else than one number or None per completion."""


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function known to `rewards.functions` under `name`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        REGISTRY[name] = function
        return function

    return add


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward function with its name, its weight, and the columns that it cannot do without."""

    name: str
    function: Callable[..., Any]
    weight: float
    required_columns: tuple[str, ...]

    def applies_to(self, example: Example) -> bool:
        """Every column that the function needs has a value in this row."""
        return all(example.columns.get(column) is not None for column in self.required_columns)


@dataclass(frozen=True, kw_only=True)
class RewardOutcome:
    """What one function said of some samples, and what went wrong."""

    values: list[float | None]
    failed: list[bool]
    """True where the function broke a rule: the sample's whole reward is then unknown."""
    timed_out: bool = False
    message: str | None = None
    """The first failure, for people."""
    seconds: float = 0.0


def find_function(name: str) -> Callable[..., Any]:
    """A registry name, `module:function` or `path.py:function` -> the function.

    Raises:
        UsageError: Nothing there by that name; the message lists what is.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    source, _, attribute = name.rpartition(":")
    if not source:
        raise UsageError(
            f"unknown reward function '{name}': use one of {', '.join(sorted(REGISTRY))}, "
            "or `module:function`, or `path.py:function`"
        )
    try:
        module = _load_file(Path(source).resolve()) if source.endswith(".py") else _import(source)
    except Exception as error:  # the user's own code runs here and may raise anything
        raise UsageError(f"reward function '{name}': cannot import '{source}': {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"reward function '{name}': '{source}' has no function '{attribute}'")
    return function


def _import(module: str) -> Any:
    """Import by name; modules beside the user, in the working directory, are found too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


def _load_file(path: Path) -> Any:
    """Run a Python file once; its neighbours can be imported from it."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"uniapl_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def named_reward(
    name: str, function: Callable[..., Any], *, weight: float = 1.0, args: dict[str, Any] | None = None
) -> NamedReward:
    """Bind arguments and read from the signature which columns the function needs.

    Raises:
        UsageError: An argument that the function does not take.
    """
    if not callable(function):
        raise UsageError(f"{function!r} is no reward function: names belong in rewards.functions")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise UsageError(
            f"reward function '{name}' does not say which arguments it takes: {error}"
        ) from error
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for argument in args or {}:
        if argument not in parameters and not takes_any:
            raise UsageError(f"reward function '{name}' takes no argument '{argument}'")
    bound = functools.partial(function, **(args or {}))
    required = tuple(
        p.name
        for p in parameters.values()
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and p.name not in STANDARD_ARGUMENTS
        and p.name not in (args or {})
    )
    return NamedReward(name=name, function=bound, weight=weight, required_columns=required)


class Rewarder:
    """All reward functions of a run: calls them, applies the rules, adds up."""

    def __init__(self, rewards: Sequence[NamedReward], *, timeout: float | None = 60.0) -> None:
        self.rewards: list[NamedReward] = []
        for reward in rewards:
            self.rewards.append(replace(reward, name=self._free_name(reward.name)))
        self.timeout = timeout

    def _free_name(self, name: str) -> str:
        """The name, with a number where it is taken (one function, other arguments): metrics stay apart."""
        taken = {reward.name for reward in self.rewards}
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)

    def applies_to(self, example: Example) -> bool:
        """Some function can score answers to this row."""
        return any(reward.applies_to(example) for reward in self.rewards)

    def check_columns(self, examples: Iterable[Example]) -> None:
        """Refuse a function whose columns no row has.

        Raises:
            UsageError: Naming the function, the missing column, and the columns that there are.
        """
        known = {key for example in examples for key, value in example.columns.items() if value is not None}
        for reward in self.rewards:
            for column in reward.required_columns:
                if column not in known:
                    raise UsageError(
                        f"reward function '{reward.name}' needs a column '{column}', which no row fills "
                        f"(columns: {', '.join(sorted(known)) or 'none'}); rename yours by data.columns, or "
                        "give the argument a default or a value in rewards.functions"
                    )

    def score(
        self, examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> dict[str, RewardOutcome]:
        """Function name -> its outcome over all samples, each sample with its example.

        A function that raises on the whole batch is called again sample by sample, so that one bad answer
        does not cost the others their reward. A time-out, or a result of a wrong form, is not repeated.
        """
        return {
            reward.name: self.score_one(reward, examples, texts, completion_ids) for reward in self.rewards
        }

    def score_one(
        self,
        reward: NamedReward,
        examples: Sequence[Example],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> RewardOutcome:
        """:meth:`score` for one function."""
        values: list[float | None] = [None] * len(examples)
        failed = [False] * len(examples)
        chosen = [index for index, example in enumerate(examples) if reward.applies_to(example)]
        if not chosen:
            return RewardOutcome(values=values, failed=failed)
        start = time.monotonic()

        def call(indices: list[int]) -> list[float | None]:
            arguments = _arguments(
                reward,
                [examples[i] for i in indices],
                [texts[i] for i in indices],
                [list(completion_ids[i]) for i in indices],
            )
            return _call(reward.function, arguments, self.timeout, len(indices))

        message, timed_out = None, False
        try:
            for index, value in zip(chosen, call(chosen), strict=True):
                values[index] = value
        except (RewardTimeoutError, WrongFormError) as error:
            message, timed_out = str(error), isinstance(error, RewardTimeoutError)
            for index in chosen:
                failed[index] = True
        except Exception as error:  # the user's own code may raise anything
            message = f"{type(error).__name__}: {error}{_place(error)}"
            for index in chosen:
                if timed_out:
                    failed[index] = True
                    continue
                try:
                    values[index] = call([index])[0]
                except RewardTimeoutError:
                    failed[index] = timed_out = True
                except Exception:
                    failed[index] = True
        for index in chosen:
            value = values[index]
            if value is not None and not math.isfinite(value):
                message = message or f"returned {value}"
                values[index], failed[index] = None, True
        return RewardOutcome(
            values=values,
            failed=failed,
            timed_out=timed_out,
            message=message,
            seconds=time.monotonic() - start,
        )

    def combine(self, outcomes: dict[str, RewardOutcome], count: int) -> list[float | None]:
        """The reward of each sample: the weighted sum over the functions that apply to it.

        None where no function applies, and where one failed: without its part the sum would be a lie.
        """
        combined: list[float | None] = []
        for index in range(count):
            known = [
                reward.weight * value
                for reward in self.rewards
                if (value := outcomes[reward.name].values[index]) is not None
            ]
            failed = any(outcome.failed[index] for outcome in outcomes.values())
            combined.append(None if failed or not known else sum(known))
        return combined


def _arguments(
    reward: NamedReward, examples: list[Example], texts: list[str], completion_ids: list[list[int]]
) -> dict[str, Any]:
    everything: dict[str, Any] = {
        # A copy: a function that changes its arguments must not change the data of later steps.
        column: [copy.deepcopy(example.columns.get(column)) for example in examples]
        for column in {column for example in examples for column in example.columns}
    }
    everything["prompts"] = [example.prompt for example in examples]
    everything["completions"] = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    everything["completion_ids"] = completion_ids
    function: Any = reward.function
    parameters = inspect.signature(function.func).parameters
    everything = {key: value for key, value in everything.items() if key not in function.keywords}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return everything
    return {key: value for key, value in everything.items() if key in parameters}


def _call(
    function: Callable[..., Any], arguments: dict[str, Any], timeout: float | None, count: int
) -> list[float | None]:
    """The function's `count` values, awaited if it is async; RewardTimeoutError after `timeout` seconds.

    A thread cannot be killed: one that hangs is left behind as a daemon and cannot keep the run from ending.
    """

    def run() -> list[float | None]:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        return _checked(result, count)

    if timeout is None:
        return run()
    outcome: list[list[float | None]] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(run())
        except BaseException as error:  # carried over to the calling thread, below
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise RewardTimeoutError(f"no answer within {timeout} s")
    if failure:
        # A reward function that calls sys.exit() must not end the run.
        error = failure[0]
        raise error if isinstance(error, Exception) else RuntimeError(repr(error))
    return outcome[0]


def _place(error: Exception) -> str:
    """Where in the user's file an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f" ({Path(last.filename).name}, line {last.lineno})" if last and last.filename != __file__ else ""


async def _awaited(result: Any) -> Any:
    return await result


def _checked(result: Any, count: int) -> list[float | None]:
    """The result as floats and Nones, or a WrongFormError that says what is wrong with it."""
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise WrongFormError(
            f"must return a list with one value per completion, returned {type(result).__name__}"
        )
    values = list(result)
    if len(values) != count:
        raise WrongFormError(f"returned {len(values)} values for {count} completions")
    checked: list[float | None] = []
    for value in values:
        if value is None:
            checked.append(None)
            continue
        try:
            checked.append(float(value.item() if hasattr(value, "item") else value))
        except (TypeError, ValueError) as error:
            raise WrongFormError(f"returned {value!r} where a number or None belongs") from error
        if isinstance(value, str):
            raise WrongFormError(f"returned the text {value!r} where a number or None belongs")
    return checked
