"""Rewards that compare a final answer with the row's solution; tests/parity compares them with TRL's."""

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from uniapl import cli
from uniapl.errors import UsageError
from uniapl.rewards.base import Rewarder, named_reward
from uniapl.rewards.finding import find_function
from uniapl.rewards.math_process import MathProcess
from uniapl.types import Example

TOWER = r"\boxed{9^{9^{9^9}}}"


def example(row: int, **columns: Any) -> Example:
    return Example(
        row=row, prompt="p", prompt_ids=(1,), demonstration=None, demonstration_ids=None, columns=columns
    )


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("#### 72", "48/2 = <<48/2=24>>24\n#### 72", 1.0),
        ("So 72.\n####72\n", "72", 1.0),
        ("####\n72", "72", 1.0),
        ("#### 71\n#### 72", "72", 1.0),  # the last one counts
        ("#### 71 #### 72", "72", 1.0),
        ("#### $1,018.00", "1018", 1.0),
        ("#### 1018", "#### 1,018", 1.0),
        ("#### 1,018.", "1018", 1.0),
        ("#### -$5", "#### -5", 1.0),
        ("#### $-5", "-5", 1.0),
        ("#### −5", "-5", 1.0),  # noqa: RUF001 - the minus sign
        ("#### .5", "0.50", 1.0),
        ("#### 50%", "50", 1.0),
        ("#### 072", "72", 1.0),
        ("#### 72", 72, 1.0),
        ("#### 72", 72.0, 1.0),
        ("#### Paris", "Paris", 1.0),
        # Nearly right.
        ("72", "72", 0.0),
        ("### 72", "72", 0.0),
        ("#### ", "72", 0.0),
        ("#### 72\n#### 71", "72", 0.0),
        ("#### 720", "72", 0.0),
        ("#### -72", "72", 0.0),
        ("#### 72.01", "72", 0.0),
        ("#### 72 or 73", "72", 0.0),
        ("#### 72 dollars", "72", 0.0),
        ("#### 7 2", "72", 0.0),
        ("#### 10,18", "1018", 0.0),  # no thousands separator
        ("#### 1,018", "1.018", 0.0),
        ("#### 1018", "1,0180", 0.0),
        ("#### --5", "-5", 0.0),
        ("#### -$-5", "-5", 0.0),
        ("#### ,", "0", 0.0),
        ("#### paris", "Paris", 0.0),
        ("#### 72", "Add 12.\nIt is 72", None),
        ("#### 72", " ", None),
    ],
)
def test_exact_match(text: str, answer: Any, expected: float | None) -> None:
    assert find_function("exact_match")([text], answer=[answer]) == [expected]
    assert find_function("exact_match")([[{"role": "assistant", "content": text}]], answer=[answer]) == [
        expected
    ]


def test_exact_match_after_another_pattern() -> None:
    exact = find_function("exact_match")
    texts = ["<answer>4</answer>", "<answer>4.0</answer> <answer>5</answer>", "<answer>4", "Answer: 4"]
    assert exact(texts, answer=["4"] * 4, pattern=r"<answer>(.*?)</answer>") == [1, 0, 0, 0]
    # Without a group the whole match is compared, and a group that took no part is no answer.
    assert exact(["it is B", "it is C"], answer=["B", "B"], pattern="[A-D]$") == [1, 0]
    assert exact(["xy"], answer=["y"], pattern="x|(y)") == [1]
    assert exact(["yx"], answer=["4"], pattern="x|(y)") == [0]
    with pytest.raises(UsageError, match=r"the pattern '\(' is invalid: missing \)"):
        exact(["a"], answer=["a"], pattern="(")


def test_rows_without_an_answer_are_named() -> None:
    rewarder = Rewarder([named_reward("exact_match", find_function("exact_match"))])
    rows = [example(1, answer="#### 4"), example(2, answer="Two.\nLines"), example(3, answer="4")]
    [note] = rewarder.check_rows(rows)
    assert note.startswith("reward 'exact_match' does not apply to 1 rows, whose 'answer' is empty, or has")
    assert note.endswith(": 2")
    assert rewarder.score(rows, ["#### 4"] * 3, [(1,)] * 3)["exact_match"].values == [1, None, 1]
    with pytest.raises(UsageError, match=r"row 4: 'answer' must be text or a number, not \['4'\]"):
        rewarder.check_rows([example(4, answer=["4"])])


def test_rows_with_unparseable_solutions_are_named() -> None:
    pytest.importorskip("math_verify")
    rewarder = Rewarder([named_reward("accuracy_reward", find_function("accuracy_reward"))])
    rows = [example(1, solution=72), example(2, solution="unknown"), example(3, solution=TOWER)]
    [note] = rewarder.check_rows(rows)
    assert "does not apply to 1 rows, whose 'solution' math-verify cannot parse" in note
    assert note[-3:] == ": 2"
    found = rewarder.score(rows[:2], [r"\boxed{72}"] * 2, [(1,)] * 2)["accuracy_reward"]
    assert found.values == [1.0, None]
    assert not any(found.failed)
    assert found.extra["answer_parsed"] == ["[72, '72']", None]


def test_an_answer_without_end_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the same process would hold the interpreter, so that no timeout would end the call."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr("uniapl.rewards.answers._math", MathProcess(seconds=1.5))
    rewarder = Rewarder([named_reward("accuracy_reward", find_function("accuracy_reward"))])
    rows = [example(number, solution="72") for number in range(4)]
    texts = [r"\boxed{72}", TOWER, r"\boxed{\sum_{k=1}^{1000000} k^k}", r"\boxed{72}"]
    found = rewarder.score(rows, texts, [(1,)] * 4)["accuracy_reward"]
    assert found.values == [1.0, 0.0, 0.0, 1.0]
    assert found.extra["answer_parsed"][1] == "[timed out]"


def test_a_process_that_dies_gives_no_reward_and_is_started_again() -> None:
    pytest.importorskip("math_verify")
    process = MathProcess()
    assert process.compare("72", r"\boxed{72}").reward == 1.0
    child = process._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    reward = process.compare("72", r"\boxed{72}").reward
    assert isinstance(reward, RuntimeError)
    assert "exit code -9" in str(reward)
    assert process.compare("72", r"\boxed{71}").reward == 0.0


def test_the_process_ends_when_its_input_ends() -> None:
    """The end of a program closes the pipe, however it ends."""
    pytest.importorskip("math_verify")
    process = MathProcess()
    assert process.compare("72", r"\boxed{72}").reward == 1.0
    child = process._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(20) == 0


def hide_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hidden = lambda name, *args: None if name == "math_verify" else real(name, *args)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", hidden)


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_math_verify(monkeypatch)
    message = r"accuracy_reward and reasoning_accuracy_reward need math-verify: pip install 'uniapl\[math\]'"
    with pytest.raises(UsageError, match=message):
        MathProcess().compare("72")


def test_check_reports_a_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    monkeypatch.setattr("uniapl.rewards.answers._math", MathProcess())
    hide_math_verify(monkeypatch)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "solution": "72"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: grpo\nrewards: {functions: [accuracy_reward]}\n")
    flags = ["--model.model-name-or-path", str(model_dir), "--data.path", str(data)]
    flags += ["--rollout.max-completion-length", "8"]
    assert cli.run(["check", str(recipe), *flags]) == 2
    assert "pip install 'uniapl[math]'" in capsys.readouterr().err
