"""`code_verifiers`: verifier functions that come with the data as Python source, as AutoIF writes them.

A row's `eval_func` holds sources of functions `evaluate(response) -> bool` (alone, or each in a list with its
author's own score), its `cases` pairs of a text and what a right function says of it. Everything runs in
:mod:`uniapl.rewards.sandbox`, and only if the configuration allows it. Source of the format and of the bar of
0.8: AutoIF (arXiv 2406.13542); that a majority decides is our choice.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import answer_text
from uniapl.rewards.finding import register
from uniapl.rewards.sandbox import Job, Sandbox, SandboxError, SandboxTimeoutError
from uniapl.types import Example

TRIES = 3
"""How often a function may run out of time on a case."""
SHOWN = 10
"""Dropped functions that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A function and how it did on its cases."""

    source: str
    problem: str | None
    """Why it is dropped, None if it is kept."""


class CodeVerifiers:
    """The reward function; its pool of workers starts with the first job and ends with the process."""

    runs_code_from_data = True

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None
        self._tested: dict[tuple[Any, ...], list[Tested]] = {}

    def __call__(
        self,
        completions: list[Any],
        eval_func: list[Any],
        cases: list[Any] | None = None,
        *,
        min_agreement: float = 0.8,
    ) -> list[float | Exception]:
        """1 where more than half of a row's good functions accept the answer, else 0.

        A function that gives no verdict (it raises, hangs, or returns no bool) has no vote; where none has
        one, the answer could not be scored.

        Args:
            min_agreement: Functions that agree with fewer of their cases are not asked.
        """
        texts = [answer_text(completion) for completion in completions]
        jobs = [
            [Job(source, text) for source in self.good_functions(functions, known, min_agreement)]
            for functions, known, text in zip(eval_func, cases or [None] * len(texts), texts, strict=True)
        ]
        verdicts = iter(self.sandbox().run([job for row in jobs for job in row]))
        return [_vote([next(verdicts) for _ in row]) for row in jobs]

    def sandbox(self) -> Sandbox:
        """The pool of workers.

        Raises:
            UsageError: No jail can be set up here.
        """
        self._sandbox = self._sandbox or Sandbox()
        return self._sandbox

    def good_functions(self, functions: Any, cases: Any, min_agreement: float) -> list[str]:
        """Sources of those functions that agree with enough of their cases."""
        return [t.source for t in self.tested(functions, cases, min_agreement) if t.problem is None]

    def tested(self, functions: Any, cases: Any, min_agreement: float) -> list[Tested]:
        """Every function of a row with what is wrong with it; each is tried once per process."""
        sources, known = _sources(functions), _cases(cases)
        key = (*sources, None, *known, min_agreement)
        if key not in self._tested:
            jobs = [Job(source, text) for source in sources for text, _ in known]
            answers = self.sandbox().run(jobs)
            for _ in range(TRIES - 1):
                # What a busy machine has slowed down must not decide which rows there are.
                late = [place for place, one in enumerate(answers) if isinstance(one, SandboxTimeoutError)]
                for place, answer in zip(late, self.sandbox().run([jobs[p] for p in late]), strict=True):
                    answers[place] = answer
            verdicts = iter(answers)
            self._tested[key] = [
                Tested(source=source, problem=_problem([next(verdicts) for _ in known], known, min_agreement))
                for source in sources
            ]
        return self._tested[key]

    def check_rows(self, examples: Sequence[Example], *, min_agreement: float = 0.8) -> RowCheck:
        """Try every function on its cases; rows that no function is left for have no reward.

        Raises:
            UsageError: Columns of a wrong form, naming the row.
        """
        dropped: list[str] = []
        unusable: dict[int, str] = {}
        for example in examples:
            columns = example.columns
            try:
                found = self.tested(columns["eval_func"], columns.get("cases"), min_agreement)
            except ValueError as error:
                raise UsageError(f"row {example.row}: {error}") from error
            dropped += [
                f"row {example.row}, function {number}: {tested.problem}"
                for number, tested in enumerate(found, start=1)
                if tested.problem is not None
            ]
            if all(tested.problem is not None for tested in found):
                unusable[example.row] = "which have no good function"
        notes = [f"sandbox: {', '.join(self.sandbox().layers)}"]
        if dropped:
            rest = len(dropped) - SHOWN
            more = f"; and {rest} more (uniapl check --json lists them)" if rest > 0 else ""
            notes.append(f"dropped {len(dropped)} functions: {'; '.join(dropped[:SHOWN])}{more}")
        return RowCheck(unusable=unusable, notes=notes, details=dropped)


def _vote(verdicts: Sequence[bool | SandboxError]) -> float | Exception:
    votes = [verdict for verdict in verdicts if isinstance(verdict, bool)]
    if not votes:
        failures = [str(verdict) for verdict in verdicts]
        return SandboxError(failures[0] if failures else "the row has no good function")
    return float(2 * sum(votes) > len(votes))


def _problem(
    verdicts: Sequence[bool | SandboxError], cases: Sequence[tuple[str, bool]], min_agreement: float
) -> str | None:
    """Why a function with these verdicts on its cases is not to be trusted."""
    if not cases:
        return "has no case to agree with"
    agreed = sum(verdict == expected for verdict, (_, expected) in zip(verdicts, cases, strict=True))
    if agreed >= min_agreement * len(cases):
        return None
    failure = next((f" ({verdict})" for verdict in verdicts if isinstance(verdict, SandboxError)), "")
    return f"agrees with {agreed} of {len(cases)} cases{failure}"


def _sources(value: Any) -> list[str]:
    """The sources in `eval_func`: one, a list, or AutoIF's list of [source, score]; or JSON of these."""
    parsed = _parsed(value)
    parsed = parsed if isinstance(parsed, list | tuple) else [parsed]
    items = [item[0] if isinstance(item, list | tuple) and item else item for item in parsed]
    sources = [item for item in items if isinstance(item, str)]
    if sources and len(sources) == len(items):
        return list(dict.fromkeys(sources))
    raise ValueError(f"'eval_func' must be Python source, or a list of sources, not {value!r:.80}")


def _cases(value: Any) -> list[tuple[str, bool]]:
    """The cases, if any: [text, bool] pairs, or mappings with `input` and `output`, or the text of these."""
    parsed = _parsed(value) if value is not None else []
    found: list[tuple[str, bool]] = []
    for item in parsed if isinstance(parsed, Sequence) and not isinstance(parsed, str) else [None]:
        if isinstance(item, Mapping):
            item = (item.get("input"), item.get("output"))
        text, expected = item if isinstance(item, Sequence) and len(item) == 2 else (None, None)
        if isinstance(expected, str):
            expected = {"true": True, "false": False}.get(expected.strip().lower())
        if not isinstance(text, str) or not isinstance(expected, bool):
            form = "[text, true or false] or {input: text, output: true or false}"
            raise ValueError(f"'cases' must be a list of {form}, not {value!r:.80}")
        found.append((text, expected))
    return found


def _parsed(value: Any) -> Any:
    """JSON, or Python's way to write the same (AutoIF keeps its cases so); other text as it is."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


register("code_verifiers")(CodeVerifiers())
