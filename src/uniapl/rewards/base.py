"""Named and weighted reward functions: checks before training, calls, and the combined reward."""

import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import TrainerState

from uniapl.config import RewardsConfig
from uniapl.errors import UsageError
from uniapl.rewards.calls import Completion, is_async, is_async_generator
from uniapl.rewards.finding import find_function
from uniapl.rewards.scoring import RewardOutcome, score_samples
from uniapl.threads import in_background
from uniapl.types import Example

STANDARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""TRL's; every other parameter names a column."""
ENVIRONMENTS = "environments"
"""TRL's, with an environment; without one it names a column too."""
Start = Callable[[Sequence[Example]], list[Any]]
"""Makes a fresh environment for each row."""
Once = Callable[[Callable[[], Any]], Any]
"""Calls a function in one of several processes and returns its result in all of them."""


def here(work: Callable[[], Any]) -> Any:
    """:data:`Once` for a single process."""
    return work()


class RewardFunction(Protocol):
    """TRL's signature; see :mod:`uniapl.rewards`."""

    def __call__(self, **kwargs: Any) -> Any:
        """One float, None or Exception per completion (or an awaitable of that)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """The result of a reward function's own `check_rows`, before training.

    Examples:
        RowCheck(unusable={17: "none of its functions agrees with its cases"}, notes=["sandbox: landlock"])
    """

    unusable: Mapping[int, str] = field(default_factory=dict[int, str])
    """Row number -> why the function does not apply to that row."""
    notes: Sequence[str] = ()
    """Messages for the user."""
    details: Sequence[str] = ()
    """The findings that the notes summarise, for `uniapl check --json`."""
    state: Any = None
    """What the function needs when it scores. With several processes only one calls `check_rows`, and each
    passes this value to the function's attribute `load_state`, if it has one."""


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward function with its arguments bound, its name, its weight and the columns that it requires."""

    name: str
    function: functools.partial[Any]
    weight: float
    required_columns: tuple[str, ...]
    unusable: Mapping[int, str] = field(default_factory=dict[int, str])
    """See :class:`RowCheck`."""

    def applies_to(self, example: Example) -> bool:
        """Whether the row has a value in every required column and the function's own check accepts it."""
        filled = all(example.columns.get(column) is not None for column in self.required_columns)
        return filled and example.row not in self.unusable


def named_reward(
    name: str, function: Callable[..., Any], *, weight: float = 1.0, args: dict[str, Any] | None = None
) -> NamedReward:
    """Bind the arguments, and read from the signature which columns the function requires.

    Raises:
        UsageError: The function does not take one of the arguments, has no signature, or is an async
            generator.
    """
    args = args or {}
    if not callable(function):
        raise UsageError(f"{function!r} is not a function: names of functions belong in rewards.functions")
    if is_async_generator(function):
        raise UsageError(
            f"reward function '{name}' is an async generator: return a list instead of using `yield`"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise UsageError(f"reward function '{name}' has no signature that can be read: {error}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in args:
        if not takes_any and argument not in [p.name for p in parameters]:
            raise UsageError(f"reward function '{name}' takes no argument '{argument}'")
    required = tuple(
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in (*STANDARD_ARGUMENTS, *args)
    )
    bound = functools.partial(function, **args)
    return NamedReward(name=name, function=bound, weight=weight, required_columns=required)


def build_rewarder(
    config: RewardsConfig,
    functions: Sequence[Callable[..., Any]] = (),
    trainer_state: TrainerState | None = None,
    *,
    once: Once = here,
    start: Start | None = None,
) -> "Rewarder":
    """The reward functions of a configuration, followed by further callables.

    Args:
        once: Runs the checks before training, which call the functions.
        start: See :class:`Rewarder`.
    """
    named = [
        named_reward(f.name, find_function(f.name), weight=f.weight, args=f.args) for f in config.functions
    ]
    named += [named_reward(getattr(f, "__name__", "reward"), f) for f in functions]
    return Rewarder(named, timeout=config.timeout, trainer_state=trainer_state, once=once, start=start)


class Rewarder:
    """All reward functions of a run: checks them, calls them and combines their values.

    Args:
        start: Makes environments for completions that are no rollouts, such as those of :meth:`try_out`; None
            if the run has no environment.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        *,
        timeout: float | None = 60.0,
        trainer_state: TrainerState | None = None,
        once: Once = here,
        start: Start | None = None,
    ) -> None:
        self.rewards: list[NamedReward] = []
        for reward in rewards:
            if start is not None:
                columns = tuple(column for column in reward.required_columns if column != ENVIRONMENTS)
                reward = replace(reward, required_columns=columns)
            # The same function with other arguments gets a number, so that its metrics have their own names.
            names = itertools.chain([reward.name], (f"{reward.name}_{n}" for n in itertools.count(2)))
            taken = {other.name for other in self.rewards}
            self.rewards.append(replace(reward, name=next(name for name in names if name not in taken)))
        self.timeout = timeout
        self.trainer_state = trainer_state or TrainerState()
        """Passed to functions that take it; a run updates it at each step."""
        self._once = once
        self._start = start
        self.details: list[str] = []
        """The single findings of :meth:`check_rows`."""

    @property
    def weights(self) -> dict[str, float]:
        """Reward function -> its weight."""
        return {reward.name: reward.weight for reward in self.rewards}

    def applies_to(self, example: Example) -> bool:
        """Whether at least one function can score completions of this row."""
        return any(reward.applies_to(example) for reward in self.rewards)

    def check_columns(self, examples: Iterable[Example]) -> None:
        """Check that every required column has a value in some row.

        Raises:
            UsageError: Names the function, the missing column and the existing columns.
        """
        known = {key for example in examples for key, value in example.columns.items() if value is not None}
        for reward in self.rewards:
            for column in reward.required_columns:
                if column not in known:
                    if column == ENVIRONMENTS:
                        raise UsageError(
                            f"reward function '{reward.name}' takes 'environments', but there are none; set "
                            "rollout.environment"
                        )
                    others = ", ".join(sorted(known)) or "none"
                    arguments = [*STANDARD_ARGUMENTS, *sorted(known)]
                    close = difflib.get_close_matches(column, arguments, n=1, cutoff=0.7)
                    meant = f" Did you mean '{close[0]}'?" if close else ""
                    raise UsageError(
                        f"reward function '{reward.name}' needs a column '{column}', but no row has a value "
                        f"for it (columns besides prompt and completion: {others:.200}).{meant} Add it, "
                        "rename one with data.columns, or give the argument a default or a value in "
                        f"rewards.functions. Arguments that are not columns: {', '.join(STANDARD_ARGUMENTS)}"
                    )

    def check_rows(self, examples: Sequence[Example], *, allow_code: bool = False) -> list[str]:
        """Call `check_rows` of every function that has it, and return the notes for the user.

        Raises:
            UsageError: A function cannot read a row; or it runs code from the data (its attribute
                `runs_code_from_data`) without `allow_code`.
        """
        notes: list[str] = []
        for index, reward in enumerate(self.rewards):
            if getattr(reward.function.func, "runs_code_from_data", False) and not allow_code:
                raise UsageError(
                    f"reward function '{reward.name}' runs Python code from the data in a sandbox: set "
                    "rewards.allow_code_verifiers to true to allow it"
                )
            check = getattr(reward.function.func, "check_rows", None)
            rows = [example for example in examples if reward.applies_to(example)]
            if check is None or not rows:
                continue
            found: RowCheck = self._tried(functools.partial(check, rows, **reward.function.keywords))
            load_state = getattr(reward.function.func, "load_state", None)
            if load_state is not None:
                load_state(found.state)
            self.rewards[index] = replace(reward, unusable=found.unusable)
            label = f"reward '{reward.name}'"
            notes += [f"{label}: {note}" for note in found.notes]
            self.details += [f"{label}: {detail}" for detail in found.details]
            for reason in dict.fromkeys(found.unusable.values()):
                numbers = [row for row, its_reason in found.unusable.items() if its_reason == reason]
                notes.append(f"{label} does not apply to {len(numbers)} rows, {reason}: {_listed(numbers)}")
        return notes

    def try_out(self, examples: Sequence[Example]) -> None:
        """Call every function on two rows, so that a broken one is reported before training.

        Raises:
            UsageError: The function raised, timed out, or returned values of a wrong form.
        """
        for reward in self.rewards:
            rows = [example for example in examples if reward.applies_to(example)][:2]
            texts = [example.demonstration or "An answer." for example in rows]
            ids = [row.demonstration_ids or (0,) for row in rows]
            outcome = self._tried(functools.partial(self.score_one, reward, rows, texts, ids))
            # A single failure may be due to that completion.
            if rows and all(outcome.failed):
                form = _form_hint(rows[0], outcome.message or "")
                raise UsageError(
                    f"reward function '{reward.name}' fails on rows {_listed([row.row for row in rows])} of "
                    f"the data: {outcome.message}{form}"
                )

    def _tried(self, work: Callable[[], Any]) -> Any:
        # The functions may change the working directory, to which the paths of suites are relative.
        with chdir("."):
            return self._once(work)

    def score(
        self,
        examples: Sequence[Example],
        texts: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        environments: Sequence[Any] | None = None,
    ) -> dict[str, RewardOutcome]:
        """Function name -> its outcome over all samples; the arguments have one entry per sample.

        Async functions run concurrently with each other and with the rest.

        Args:
            environments: None makes fresh ones, if the run has an environment.
        """
        if environments is None and self._start is not None:
            environments = self._start(examples)

        def score_by(reward: NamedReward) -> RewardOutcome:
            return self.score_one(reward, examples, texts, completion_ids, environments)

        started = {
            reward.name: in_background(functools.partial(score_by, reward))
            for reward in self.rewards
            if is_async(reward.function)
        }
        found = {reward.name: score_by(reward) for reward in self.rewards if reward.name not in started}
        found |= {name: future.result() for name, future in started.items()}
        return {reward.name: found[reward.name] for reward in self.rewards}

    def score_one(
        self,
        reward: NamedReward,
        examples: Sequence[Example],
        texts: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        environments: Sequence[Any] | None = None,
    ) -> RewardOutcome:
        """:meth:`score` for one function."""
        if environments is None and self._start is not None:
            environments = self._start(examples)
        return score_samples(
            reward.function,
            examples,
            texts,
            completion_ids,
            applicable=[index for index, example in enumerate(examples) if reward.applies_to(example)],
            timeout=self.timeout,
            trainer_state=self.trainer_state,
            environments=environments,
        )

    def combine(self, outcomes: dict[str, RewardOutcome], count: int) -> list[float | None]:
        """The reward of each sample: the weighted sum over the functions that apply to it.

        It is None if no function applies, or if one failed, because the sum without its value would be wrong.
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


def _form_hint(example: Example, message: str) -> str:
    """How to read completions of this row, for a function written for the other form."""
    if not isinstance(example.prompt, str):
        return "; completions of chat prompts are lists of messages: use c[-1]['content'] for the last one"
    if "string indices must be integers" in message or "'str' object has no attribute" in message:
        return (
            "; completions of text prompts are strings: use c instead of c[0]['content'], or set "
            "data.prompt_format to chat"
        )
    return ""
