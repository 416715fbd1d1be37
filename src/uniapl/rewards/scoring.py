"""The values of one reward function for some samples, and the rule for its failures."""

import functools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerState

from uniapl.files import json_line
from uniapl.rewards.calls import (
    Completion,
    FailedStart,
    Value,
    WrongFormError,
    arguments_of,
    call,
    error_location,
)
from uniapl.rewards.event_loop import RewardTimeoutError
from uniapl.types import Example


@dataclass(kw_only=True)
class RewardOutcome:
    """One function's values for some samples, its failures, and what it logged."""

    values: list[float | None]
    failed: list[bool]
    """True if the function failed on the sample, whose combined reward is then unknown."""
    timed_out: list[bool]
    """True if it failed because a call took too long."""
    message: str | None = None
    """The first failure."""
    seconds: float = 0.0
    extra: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    """Column -> what the function logged for each sample by `log_extra`; None if it logged nothing."""
    metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Metric -> the values that the function logged by `log_metric`."""

    def followed_by(self, other: "RewardOutcome") -> "RewardOutcome":
        """The outcome for the samples of both, in this order."""
        return RewardOutcome(
            values=self.values + other.values,
            failed=self.failed + other.failed,
            timed_out=self.timed_out + other.timed_out,
            message=other.message if self.message is None else self.message,
            seconds=self.seconds + other.seconds,
            extra={
                column: [v for o in (self, other) for v in o.extra.get(column, [None] * len(o.values))]
                for column in {**self.extra, **other.extra}
            },
            metrics={
                name: self.metrics.get(name, []) + other.metrics.get(name, [])
                for name in {**self.metrics, **other.metrics}
            },
        )


@dataclass(frozen=True)
class CallLog:
    """What a function logs in one call, by TRL's `log_extra` and `log_metric`."""

    extra: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add values, one per completion, to a column of completions.jsonl."""
        plain = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        # As they will be read from the file: other objects than JSON's become text.
        self.extra.setdefault(str(column), []).extend(json.loads(json_line({"values": plain}))["values"])

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric; the mean of the step is logged."""
        self.metrics.setdefault(str(name), []).append(float(value))

    @property
    def functions(self) -> dict[str, Any]:
        """The functions by the names of TRL's arguments."""
        return {"log_extra": self.log_extra, "log_metric": self.log_metric}

    def copy_to(self, outcome: RewardOutcome, indices: Sequence[int]) -> None:
        """Add the logs of a call for the samples `indices`.

        Raises:
            WrongFormError: A column has more or fewer values than samples.
        """
        for column, values in self.extra.items():
            if len(values) != len(indices):
                raise WrongFormError(
                    f"log_extra('{column}'): {len(values)} values, {len(indices)} completions"
                )
        for column, values in self.extra.items():
            logged = outcome.extra.setdefault(column, [None] * len(outcome.values))
            for index, value in zip(indices, values, strict=True):
                logged[index] = value
        for name, numbers in self.metrics.items():
            outcome.metrics.setdefault(name, []).extend(numbers)


def score_samples(
    function: functools.partial[Any],
    examples: Sequence[Example],
    texts: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    applicable: Sequence[int],
    timeout: float | None,
    trainer_state: TrainerState,
    environments: Sequence[Any] | None = None,
) -> RewardOutcome:
    """Call a function on the samples to which it applies.

    If it raises, it is called again for each sample, so that a failure on one completion does not cost the
    others their reward. Time-outs and results of a wrong form are final.

    Args:
        environments: The environment of each sample. The function fails on samples with a
            :class:`FailedStart`, without a call; None calls it without the argument `environments`.
    """
    size = len(examples)
    outcome = RewardOutcome(values=[None] * size, failed=[False] * size, timed_out=[False] * size)
    start = time.monotonic()

    def score_some(indices: Sequence[int]) -> dict[int, Value]:
        log = CallLog()
        started = {} if environments is None else {"environments": [environments[i] for i in indices]}
        arguments = arguments_of(
            function,
            [examples[i] for i in indices],
            [texts[i] for i in indices],
            [list(completion_ids[i]) for i in indices],
            {"trainer_state": trainer_state, **log.functions, **started},
        )
        values = call(function, arguments, timeout, len(indices))
        log.copy_to(outcome, indices)
        return dict(zip(indices, values, strict=True))

    starts = [None] * size if environments is None else environments
    failed = {index: starts[index] for index in applicable if isinstance(starts[index], FailedStart)}
    applicable = [index for index in applicable if index not in failed]
    found: dict[int, Value] = {}
    try:
        found = score_some(applicable) if applicable else {}
    except (RewardTimeoutError, WrongFormError) as error:
        outcome.message = str(error)
        found = dict.fromkeys(applicable, error)
    except Exception as error:  # the user's code may raise anything
        outcome.message = f"{type(error).__name__}: {error}{error_location(error)}"
        for index in applicable:
            try:
                found |= score_some([index])
            except Exception as failure:
                found[index] = failure
                if isinstance(failure, RewardTimeoutError):
                    # Every further call could take as long. The other samples failed with the batch.
                    found = dict.fromkeys(applicable, error) | found
                    break
    for index, value in {**found, **failed}.items():
        if isinstance(value, Exception):
            _fail(outcome, index, f"{type(value).__name__}: {value}")
            outcome.timed_out[index] = isinstance(value, RewardTimeoutError)
        elif value is not None and not math.isfinite(value):
            _fail(outcome, index, f"returned {value}")
        else:
            outcome.values[index] = value
    outcome.seconds = time.monotonic() - start
    return outcome


def _fail(outcome: RewardOutcome, index: int, message: str) -> None:
    outcome.failed[index] = True
    outcome.message = outcome.message or message


def extra_columns(outcomes: Mapping[str, RewardOutcome]) -> dict[str, list[Any]]:
    """The columns that all functions logged; the second column of a name is called `<function>/<column>`."""
    columns: dict[str, list[Any]] = {}
    for name, outcome in outcomes.items():
        for column, values in outcome.extra.items():
            columns[f"{name}/{column}" if column in columns else column] = values
    return columns
