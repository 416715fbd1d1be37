"""Reward functions with their names, weights and columns: calling all, and combining what they say."""

import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from uniapl.config import RewardsConfig
from uniapl.errors import UsageError
from uniapl.rewards.calls import RewardTimeoutError, Value, WrongFormError, arguments_of, call, error_location
from uniapl.rewards.finding import find_function
from uniapl.types import Example

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardFunction(Protocol):
    """TRL's signature; see the package's docstring."""

    def __call__(self, **kwargs: Any) -> Any:
        """One float, None or Exception per completion (or an awaitable of that)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """What a reward function's own `check_rows` found before training.

    Examples:
        RowCheck(unusable={17: "none of its functions agrees with its cases"}, notes=["sandbox: landlock"])
    """

    unusable: Mapping[int, str] = field(default_factory=dict)
    """Row number -> why the function cannot score answers to it: it does not apply to that row."""
    notes: Sequence[str] = ()
    """What the user should hear."""
    details: Sequence[str] = ()
    """All that the notes sum up, for `uniapl check --json`."""


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward function with its name, its weight, and the columns that it cannot do without."""

    name: str
    function: functools.partial[Any]
    weight: float
    required_columns: tuple[str, ...]
    unusable: Mapping[int, str] = field(default_factory=dict)
    """Rows that its own check has refused, by their numbers, and why."""

    def applies_to(self, example: Example) -> bool:
        """Every column that the function needs has a value in this row, which it has not refused."""
        filled = all(example.columns.get(column) is not None for column in self.required_columns)
        return filled and example.row not in self.unusable


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


def build_rewarder(config: RewardsConfig, functions: Sequence[Callable[..., Any]] = ()) -> "Rewarder":
    """The reward functions of a configuration, and further callables."""
    named = [
        named_reward(f.name, find_function(f.name), weight=f.weight, args=f.args) for f in config.functions
    ]
    named += [named_reward(getattr(f, "__name__", "reward"), f) for f in functions]
    return Rewarder(named, timeout=config.timeout)


class Rewarder:
    """All reward functions of a run: calls them, applies the rules, adds up."""

    def __init__(self, rewards: Sequence[NamedReward], *, timeout: float | None = 60.0) -> None:
        self.rewards: list[NamedReward] = []
        for reward in rewards:
            self.rewards.append(replace(reward, name=self._free_name(reward.name)))
        self.timeout = timeout
        self.details: list[str] = []
        """What :meth:`check_rows` has found, one by one."""

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
                        f"(columns: {', '.join(sorted(known)) or 'none':.200}); rename yours by "
                        "data.columns, or give the argument a default or a value in rewards.functions"
                    )

    def check_rows(self, examples: Sequence[Example], *, allow_code: bool = False) -> list[str]:
        """Let the functions that know how to look at the data do so; what the user should hear.

        A function may have an attribute `check_rows(examples, **args)` that returns a `RowCheck`, and
        an attribute `runs_code_from_data`: without `allow_code` it is refused.

        Raises:
            UsageError: A row that a function can make nothing of, named with what is wrong with it.
        """
        notes: list[str] = []
        for index, reward in enumerate(self.rewards):
            if getattr(reward.function.func, "runs_code_from_data", False) and not allow_code:
                raise UsageError(
                    f"reward function '{reward.name}' runs Python code that the data brings along, in a "
                    "sandbox: allow it by rewards.allow_code_verifiers: true"
                )
            look = getattr(reward.function.func, "check_rows", None)
            rows = [example for example in examples if reward.applies_to(example)]
            if look is None or not rows:
                continue
            found: RowCheck = look(rows, **reward.function.keywords)
            self.rewards[index] = replace(reward, unusable=found.unusable)
            notes += [f"reward '{reward.name}': {note}" for note in found.notes]
            self.details += [f"reward '{reward.name}': {detail}" for detail in found.details]
            reasons: dict[str, list[int]] = {}
            for row, reason in found.unusable.items():
                reasons.setdefault(reason, []).append(row)
            notes += [
                f"reward '{reward.name}' does not apply to {len(numbers)} rows, {reason}: {_listed(numbers)}"
                for reason, numbers in reasons.items()
            ]
        return notes

    def try_out(self, examples: Sequence[Example]) -> None:
        """Call every function once on two rows: what fails on the first call is better heard of now.

        Raises:
            UsageError: The function raised, hung, or returned something of a wrong form.
        """
        for reward in self.rewards:
            rows = [example for example in examples if reward.applies_to(example)][:2]
            if not rows:
                continue
            answers = [example.demonstration or "An answer." for example in rows]
            ids = [example.demonstration_ids or (0,) for example in rows]
            outcome = self.score_one(reward, rows, answers, ids)
            # One answer that cannot be scored may be just that one.
            if all(outcome.failed):
                chat = (
                    ""
                    if isinstance(rows[0].prompt, str)
                    else ("; the completions of chat prompts are lists with one message: use c[0]['content']")
                )
                raise UsageError(
                    f"reward function '{reward.name}' fails on rows {_listed([row.row for row in rows])} of "
                    f"the data: {outcome.message}{chat}"
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

        def score_some(indices: list[int]) -> list[Value]:
            arguments = arguments_of(
                reward.function,
                [examples[i] for i in indices],
                [texts[i] for i in indices],
                [list(completion_ids[i]) for i in indices],
            )
            return call(reward.function, arguments, self.timeout, len(indices))

        message, timed_out = None, False
        found: dict[int, Value] = {}
        try:
            found = dict(zip(chosen, score_some(chosen), strict=True))
        except (RewardTimeoutError, WrongFormError) as error:
            message, timed_out = str(error), isinstance(error, RewardTimeoutError)
            for index in chosen:
                failed[index] = True
        except Exception as error:  # the user's own code may raise anything
            message = f"{type(error).__name__}: {error}{error_location(error)}"
            for index in chosen:
                if timed_out:
                    failed[index] = True
                    continue
                try:
                    found[index] = score_some([index])[0]
                except RewardTimeoutError:
                    failed[index] = timed_out = True
                except Exception:
                    failed[index] = True
        for index, value in found.items():
            if isinstance(value, Exception):
                message = message or f"{type(value).__name__}: {value}"
                failed[index] = True
            elif value is not None and not math.isfinite(value):
                message = message or f"returned {value}"
                failed[index] = True
            else:
                values[index] = value
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


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
