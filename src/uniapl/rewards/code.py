"""`code_verifiers`: verifier functions that come with the data as Python source, in AutoIF's format.

A row's `eval_func` holds sources of functions `evaluate(response) -> bool`, each optionally in a list with
its author's score; `cases` holds pairs of a text and the expected verdict. Everything runs in
:mod:`uniapl.rewards.sandbox`, and only if the configuration allows it. The format and the threshold of 0.8
are AutoIF's (arXiv 2406.13542); the majority vote is our choice.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import completion_text
from uniapl.rewards.finding import register
from uniapl.rewards.sandbox import Job, Sandbox, SandboxError, SandboxTimeoutError, Verdict
from uniapl.types import Example
from uniapl.untyped import is_mapping, is_sequence

ATTEMPTS = 3
"""Times that a case may exceed its time limit, so that load on the machine does not drop a function."""
LISTED = 10
"""Dropped functions that the note lists individually."""


class CodeVerifiers:
    """The reward function; its pool of workers starts with the first job and ends with the process."""

    runs_code_from_data = True

    def __init__(self) -> None:
        self._problems: dict[str, list[str | None]] = {}
        """Digest of functions and cases -> the problem of each function."""

    def __call__(
        self,
        completions: list[Any],
        eval_func: list[Any],
        cases: list[Any] | None = None,
        *,
        min_agreement: float = 0.8,
    ) -> list[float | Exception]:
        """1 if more than half of a row's reliable functions accept the completion, else 0.

        A function without a verdict (it raises, times out, or does not return a bool) has no vote. If no
        function has one, the completion could not be scored.

        Args:
            min_agreement: A function is reliable if it agrees with at least this fraction of its cases.
        """
        texts = [completion_text(completion) for completion in completions]
        jobs = [
            [Job(source, text) for source in self.reliable(sources, known, min_agreement)]
            for sources, known, text in zip(eval_func, cases or [None] * len(texts), texts, strict=True)
        ]
        verdicts = iter(self.sandbox.run([job for row in jobs for job in row]))
        return [_vote([next(verdicts) for _ in row]) for row in jobs]

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        """The pool of workers; a UsageError if no jail can be set up on this machine."""
        return Sandbox()

    def reliable(self, functions: Any, cases: Any, min_agreement: float) -> list[str]:
        """Sources of the functions that agree with enough of their cases."""
        found = self.problems(functions, cases, min_agreement)
        return [source for source, problem in found.items() if problem is None]

    def problems(self, functions: Any, cases: Any, min_agreement: float) -> dict[str, str | None]:
        """Source -> why the function is dropped, or None; each row is tested once."""
        sources, known = _sources(functions), _cases(cases)
        key = hashlib.sha256(json.dumps([sources, known, min_agreement]).encode()).hexdigest()
        if key not in self._problems:
            jobs = [Job(source, text) for source in sources for text, _ in known]
            verdicts: dict[Job, Verdict] = {}
            for _ in range(ATTEMPTS):
                verdicts |= zip(jobs, self.sandbox.run(jobs), strict=True)
                jobs = [job for job in jobs if isinstance(verdicts[job], SandboxTimeoutError)]
            self._problems[key] = [
                _problem([verdicts[Job(source, text)] for text, _ in known], known, min_agreement)
                for source in sources
            ]
        return dict(zip(sources, self._problems[key], strict=True))

    def load_state(self, state: Mapping[str, list[str | None]]) -> None:
        """Take over the `state` of :meth:`check_rows` of another process, and start the sandbox.

        Raises:
            UsageError: No jail can be set up on this machine.
        """
        self._problems |= state
        self.sandbox.layers  # noqa: B018  (sets up the jail)

    def check_rows(self, examples: Sequence[Example], *, min_agreement: float = 0.8) -> RowCheck:
        """Test every function on its cases. The reward does not apply to rows without a reliable function.

        Raises:
            UsageError: A row's columns have a wrong form.
        """
        dropped: list[str] = []
        unusable: dict[int, str] = {}
        for example in examples:
            try:
                found = self.problems(
                    example.columns["eval_func"], example.columns.get("cases"), min_agreement
                )
            except ValueError as error:
                raise UsageError(f"row {example.row}: {error}") from error
            dropped += [
                f"row {example.row}, function {number}: {problem}"
                for number, problem in enumerate(found.values(), start=1)
                if problem is not None
            ]
            if None not in found.values():
                unusable[example.row] = "which have no reliable function"
        notes = [f"sandbox: {', '.join(self.sandbox.layers)}"]
        if dropped:
            rest = len(dropped) - LISTED
            more = f"; and {rest} more (uniapl check --json lists them)" if rest > 0 else ""
            notes.append(f"dropped {len(dropped)} functions: {'; '.join(dropped[:LISTED])}{more}")
        return RowCheck(unusable=unusable, notes=notes, details=dropped, state=self._problems)


def _vote(verdicts: Sequence[Verdict]) -> float | Exception:
    votes = [verdict for verdict in verdicts if isinstance(verdict, bool)]
    if not votes:
        return SandboxError(str(verdicts[0]) if verdicts else "the row has no reliable function")
    return float(2 * sum(votes) > len(votes))


def _problem(
    verdicts: Sequence[Verdict], cases: Sequence[tuple[str, bool]], min_agreement: float
) -> str | None:
    """Why a function with these verdicts on its cases is dropped, or None."""
    if not cases:
        return "has no cases to agree with"
    agreed = sum(verdict == expected for verdict, (_, expected) in zip(verdicts, cases, strict=True))
    if agreed >= min_agreement * len(cases):
        return None
    failure = next((f" ({verdict})" for verdict in verdicts if isinstance(verdict, SandboxError)), "")
    return f"agrees with {agreed} of {len(cases)} cases{failure}"


def _sources(value: Any) -> list[str]:
    """The sources in `eval_func`: one, a list, or AutoIF's list of [source, score]; or JSON of these."""
    parsed = _parsed(value)
    entries = parsed if is_sequence(parsed) else [parsed]
    items = [entry[0] if is_sequence(entry) and entry else entry for entry in entries]
    sources = [item for item in items if isinstance(item, str)]
    if sources and len(sources) == len(items):
        return list(dict.fromkeys(sources))
    raise ValueError(f"'eval_func' must be Python source, or a list of sources, not {value!r:.80}")


def _cases(value: Any) -> list[tuple[str, bool]]:
    """The cases, if any: [text, bool] pairs, or mappings with `input` and `output`, or the text of these."""
    parsed = _parsed(() if value is None else value)
    found: list[tuple[str, bool]] = []
    for item in parsed if is_sequence(parsed) else [None]:
        pair = (item.get("input"), item.get("output")) if is_mapping(item) else item
        text, expected = pair if is_sequence(pair) and len(pair) == 2 else (None, None)
        if isinstance(expected, str):
            expected = {"true": True, "false": False}.get(expected.strip().lower())
        if not isinstance(text, str) or not isinstance(expected, bool):
            form = "[text, true or false] or {input: text, output: true or false}"
            raise ValueError(f"'cases' must be a list of {form}, not {value!r:.80}")
        found.append((text, expected))
    return found


def _parsed(value: Any) -> Any:
    """The value of JSON or of a Python literal, in which AutoIF stores its cases; other text unchanged."""
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


register("code_verifiers")(CodeVerifiers())
