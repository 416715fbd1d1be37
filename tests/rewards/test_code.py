"""Verifier functions from data: which are reliable, how they vote, and how dropped ones are reported."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.benchmark_data import AUTOIF, DATA, on_stand_ins_and_real_data, rows
from support.runs import write_recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder
from uniapl.rewards.base import named_reward
from uniapl.rewards.code import CodeVerifiers, _cases, _sources
from uniapl.rewards.sandbox import Job, Sandbox, SandboxError, SandboxTimeoutError
from uniapl.types import Example

NO_E = "def evaluate(response):\n    return 'e' not in response.lower()"
NO_LOWER_E = "def evaluate(response):\n    return 'e' not in response"
TEXT_VERDICT = "def evaluate(response):\n    return 'true'"
NEVER = "def evaluate(response):\n    return False"
CRASH_ON_Z = "def evaluate(response):\n    return True if 'z' not in response else 1 / 0"
CASES = [["My lip", True], ["Every cloud", False], ["A cat", True], ["Hi, amigo!", True], ["Bee", False]]


def example(row: int, **columns: Any) -> Example:
    return Example(
        row=row,
        prompt="Say it.",
        prompt_ids=(1,),
        demonstration=None,
        demonstration_ids=None,
        columns=columns,
    )


@pytest.fixture(scope="module")
def verifiers() -> Iterator[CodeVerifiers]:
    found = CodeVerifiers()
    try:
        assert found.sandbox.layers
    except UsageError as error:
        pytest.skip(str(error))
    yield found
    found.sandbox.close()


def rewarder(verifiers: CodeVerifiers, **args: Any) -> Rewarder:
    return Rewarder([named_reward("code_verifiers", verifiers, args=args)])


def scores(verifiers: CodeVerifiers, texts: list[str], **columns: Any) -> list[float | None]:
    examples = [example(1, **columns)] * len(texts)
    return rewarder(verifiers).score(examples, texts, [(1,)] * len(texts))["code_verifiers"].values


def test_verifiers_are_refused_unless_allowed(verifiers: CodeVerifiers) -> None:
    with pytest.raises(UsageError, match=r"set rewards\.allow_code_verifiers to true"):
        rewarder(verifiers).check_rows([example(1, eval_func=NO_E, cases=CASES)])


def test_unreliable_functions_are_dropped_and_reported(verifiers: CodeVerifiers) -> None:
    examples = [
        example(1, eval_func=[[NO_E, 1.0], [TEXT_VERDICT, 1.0]], cases=CASES),
        example(2, eval_func=[NEVER, "def evaluate(response)"], cases=json.dumps(CASES)),
        example(3, eval_func=NO_E, cases=[{"input": "My lip", "output": "False"}]),
        example(4, eval_func=NO_E),
    ]
    scorer = rewarder(verifiers)
    sandbox, dropped, left_out = scorer.check_rows(examples, allow_code=True)
    assert sandbox.startswith("reward 'code_verifiers': sandbox: ")
    assert "rlimits" in sandbox
    assert dropped.startswith("reward 'code_verifiers': dropped 5 functions: ")
    for said in (
        "row 1, function 2: agrees with 0 of 5 cases (returned str, not a bool)",
        "row 2, function 1: agrees with 2 of 5 cases;",
        "row 2, function 2: agrees with 0 of 5 cases (SyntaxError",
        "row 3, function 1: agrees with 0 of 1 cases",
        "row 4, function 1: has no cases to agree with",
    ):
        assert said in dropped
    assert left_out.endswith("does not apply to 3 rows, which have no reliable function: 2, 3, 4")
    assert [scorer.applies_to(one) for one in examples] == [True, False, False, False]


def test_min_agreement_is_an_argument(verifiers: CodeVerifiers) -> None:
    cases = [*CASES[:4], ["E", False]]  # the second function accepts the last one: 4 of 5
    assert verifiers.reliable([NO_E, NO_LOWER_E], cases, 0.8) == [NO_E, NO_LOWER_E]
    assert verifiers.reliable([NO_E, NO_LOWER_E], cases, 0.9) == [NO_E]


def test_majority_of_verdicts_decides(verifiers: CodeVerifiers) -> None:
    three = {"eval_func": [NO_E, NO_LOWER_E, CRASH_ON_Z], "cases": [["cat", True]]}
    assert scores(verifiers, ["My lip", "tree", "E", "zoo", "zEro"], **three) == [1.0, 0.0, 1.0, 1.0, 0.0]
    #   E: no, yes, yes = yes;   zoo: yes, yes, none = yes;   zEro: no, no, none = no
    alone = {"eval_func": CRASH_ON_Z, "cases": [["cat", True]]}
    outcome = rewarder(verifiers).score([example(1, **alone)] * 2, ["a", "z"], [(1,)] * 2)["code_verifiers"]
    assert outcome.values == [1.0, None]
    assert outcome.failed == [False, True]
    assert outcome.message == "SandboxError: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"eval_func": 3, "cases": CASES}, "row 9: 'eval_func' must be Python source"),
        ({"eval_func": [], "cases": CASES}, "row 9: 'eval_func' must be"),
        ({"eval_func": [{"func": NO_E}], "cases": CASES}, "row 9: 'eval_func' must be"),
        ({"eval_func": [NO_E, 0.9], "cases": CASES}, "row 9: 'eval_func' must be"),
        (
            {"eval_func": NO_E, "cases": [["x", 3]]},
            r"row 9: 'cases' must be a list of \[text, true or false\]",
        ),
        ({"eval_func": NO_E, "cases": "yes"}, "row 9: 'cases' must be"),
    ],
)
def test_invalid_columns_are_reported_with_their_row(
    verifiers: CodeVerifiers, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        rewarder(verifiers).check_rows([example(9, **columns)], allow_code=True)


@on_stand_ins_and_real_data
def test_autoif_rows(benchmarks: Path, verifiers: CodeVerifiers) -> None:
    """Good functions with their cases; and rows whose functions disagree with most of theirs."""
    real, folder = benchmarks == DATA, benchmarks / AUTOIF
    good = [example(i, **row) for i, row in enumerate(rows(folder / "back_trans.jsonl"), start=1)]
    scorer = rewarder(verifiers)
    notes = scorer.check_rows(good, allow_code=True)
    kept = 0
    for one in good:
        functions = verifiers.reliable(one.columns["eval_func"], one.columns["cases"], 0.8)
        kept += len(functions)
        cases = _cases(one.columns["cases"])
        given = scorer.score([one] * len(cases), [text for text, _ in cases], [(1,)] * len(cases))
        agreed = [v == float(e) for v, (_, e) in zip(given["code_verifiers"].values, cases, strict=True)]
        assert sum(agreed) >= 0.95 * len(cases), one.columns["instruction"]
    assert kept == (22 if real else 6)
    assert len(notes) == 1, notes
    wrong = [example(i, **row) for i, row in enumerate(rows(folder / "query_rft.jsonl"), start=1)]
    scorer = rewarder(verifiers)
    dropped = scorer.check_rows(wrong, allow_code=True)[1]
    total, unusable, agreement = (12, [17, 18, 19, 20], "2 of 8") if real else (4, [2, 3], "1 of 4")
    first = f"dropped {total} functions: row {unusable[0]}, function 1: agrees with {agreement} cases; "
    assert first in dropped
    assert [one.row for one in wrong if not scorer.applies_to(one)] == unusable


@on_stand_ins_and_real_data
def test_autoif_functions_that_return_strings_are_dropped(benchmarks: Path, verifiers: CodeVerifiers) -> None:
    answers = rows(benchmarks / AUTOIF / "dpo_query_w_funcs.jsonl")
    examples = [
        example(i, eval_func=row["eval_func"], cases=[["2, 3, 5", True], ["1", False]])
        for i, row in enumerate(answers, start=1)
    ]
    scorer = rewarder(verifiers)
    notes = scorer.check_rows(examples, allow_code=True)
    assert not any(map(scorer.applies_to, examples))
    assert f"dropped {len(answers)} functions" in notes[1]
    assert "returned str, not a bool" in notes[1]


def test_reason_is_reported_if_no_row_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "say a.", "eval_func": TEXT_VERDICT, "cases": CASES}
    rewards = {"functions": ["code_verifiers"], "allow_code_verifiers": True}
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"), [row], method="grpo", rewards=rewards)
    assert cli.run(["check", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "no reward function applies to any row" in said
    assert "row 1, function 1: agrees with 0 of 5 cases (returned str, not a bool)" in said


def test_check_lists_every_dropped_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [f"def evaluate(response):\n    return '{number}'" for number in range(12)]
    row = {"prompt": "say a.", "eval_func": [NO_E, *wrong], "cases": CASES}
    rewards = {"functions": ["code_verifiers"], "allow_code_verifiers": True}
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"), [row], method="grpo", rewards=rewards)
    assert cli.run(["check", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["reward_details"]) == 12
    assert "row 1, function 13: agrees with 0 of 5 cases" in report["reward_details"][-1]
    assert any("and 2 more (uniapl check --json lists them)" in note for note in report["notes"])


def test_accepted_forms_of_sources_and_cases() -> None:
    assert _sources(json.dumps([[NO_E, 0.9], [NO_E, 0.9], [NEVER, 1.0]])) == [NO_E, NEVER]
    assert _sources(NO_E) == [NO_E]
    assert _cases(str(CASES)) == _cases(json.dumps(CASES)) == [(text, value) for text, value in CASES]
    assert _cases(None) == []


def test_timeouts_are_retried(verifiers: CodeVerifiers, monkeypatch: pytest.MonkeyPatch) -> None:
    run, late = Sandbox.run, [True]

    def slow(self: Sandbox, jobs: Sequence[Job]) -> list[bool | SandboxError]:
        answers = run(self, jobs)
        return [SandboxTimeoutError("slow")] * len(answers) if late and late.pop() else answers

    monkeypatch.setattr(Sandbox, "run", slow)
    assert verifiers.reliable([NO_E], [["slow at first", True]], 0.8) == [NO_E]


def test_equal_rows_are_tested_once(verifiers: CodeVerifiers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    run = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, jobs: asked.append(len(jobs)) or run(self, jobs))
    row = {"eval_func": [NO_E], "cases": [["only here", False]]}
    verifiers.check_rows([example(1, **row), example(2, **row)])
    assert [count for count in asked if count] == [1], "two rows with the same function and cases are one job"
