"""The built-in rewards with TRL's names give TRL's values, on completions that pass and that nearly pass."""

from typing import Any

import pytest
from trl import rewards as trl_rewards

from uniapl.rewards.finding import find_function


def chats(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


class Log(dict[str, list[Any]]):
    """TRL's `log_extra`."""

    def __call__(self, column: str, values: list[Any]) -> None:
        self[column] = values


PAIRS = [  # completion, solution, reward
    (r"So it is \boxed{72}.", "72", 1.0),
    (r"\boxed{72.0}", "72", 1.0),
    (r"\boxed{1,450,000}", "1450000", 1.0),
    (r"\boxed{18\text{ dollars}}", "18", 1.0),
    (r"\boxed{\frac{2}{6}}", r"$\frac{1}{3}$", 1.0),
    (r"\boxed{(x+1)^2}", r"$x^2+2x+1$", 1.0),
    ("The final answer is $72$.", "72", 1.0),
    # Nearly right: another number, an answer that is no LaTeX, or malformed LaTeX; the first \boxed counts.
    (r"\boxed{71}", "72", 0.0),
    (r"\boxed{-72}", "72", 0.0),
    (r"\boxed{720}", "72", 0.0),
    ("72", "72", 0.0),
    ("#### 72", "72", 0.0),
    (r"\boxed{72", "72", 0.0),
    (r"\boxed{}", "72", 0.0),
    (r"\boxed{71} or \boxed{72}", "72", 0.0),
    (r"\boxed{0.33}", r"$\frac{1}{3}$", 0.0),
    ("", "72", 0.0),
    # The solution cannot be parsed.
    (r"\boxed{72}", "unknown", None),
    (r"\boxed{72}", "", None),
]


@pytest.mark.parametrize("form", ["chat", "text"])
def test_accuracy_reward(form: str) -> None:
    pytest.importorskip("math_verify")
    texts, solutions, expected = (list(column) for column in zip(*PAIRS, strict=True))
    ours, theirs = Log(), Log()
    completions = chats(texts) if form == "chat" else texts
    values = find_function("accuracy_reward")(completions, solution=solutions, log_extra=ours)
    assert values == trl_rewards.accuracy_reward(chats(texts), solutions, log_extra=theirs) == expected
    assert ours == theirs
    assert ours["gold_parsed"][0] == "[72, '72']"


@pytest.mark.parametrize("delimiters", [None, ["</think>", "<answer>"]])
def test_reasoning_accuracy_reward(delimiters: list[str] | None) -> None:
    pytest.importorskip("math_verify")
    texts = [
        r"<think>\boxed{71}</think> \boxed{72}",
        r"<think>a</think>\boxed{71}</think>\boxed{72}",
        r"<think>\boxed{72}</think> \boxed{71}",
        r"<think>\boxed{72}</think> 72",
        r"<think>\boxed{72}",
        r"\boxed{72}",
        r"\boxed{71}<answer>\boxed{72}",
    ]
    solutions = ["72"] * len(texts)
    given: dict[str, Any] = {} if delimiters is None else {"reasoning_delimiters": delimiters}
    ours, theirs = Log(), Log()
    values = find_function("reasoning_accuracy_reward")(texts, solutions, ours, **given)
    assert values == trl_rewards.reasoning_accuracy_reward(chats(texts), solutions, delimiters, theirs)
    assert values == [1, 1, 0, 0, 0, 0, float(delimiters is not None)]
    assert ours == theirs


def test_think_format_reward() -> None:
    passing = [
        "<think>a</think>b",
        "<think>\na\n</think>\nb\n",
        "<think></think>",
        "<think>a</think></think>",
    ]
    failing = [
        "<think>a",
        "a</think>b",
        " <think>a</think>b",
        "<think>a<think>b</think>c",
        "<think>a</think>b<think>c",
        "<Think>a</Think>",
        "\n<think>a</think>b",
        "",
    ]
    texts = [*passing, *failing]
    values = find_function("think_format_reward")(texts)
    assert values == find_function("think_format_reward")(chats(texts))
    assert values == trl_rewards.think_format_reward(chats(texts))
    assert values == [1.0] * len(passing) + [0.0] * len(failing)


@pytest.mark.parametrize(("longest", "cache"), [(100, 20), (100, 0), (100, 100), (7, 3)])
def test_get_soft_overlong_punishment(longest: int, cache: int) -> None:
    ids = [[1] * length for length in range(longest + 3)]
    given = {"max_completion_len": longest, "soft_punish_cache": cache}
    values = find_function("get_soft_overlong_punishment")(ids, **given)
    assert values == trl_rewards.get_soft_overlong_punishment(**given)(ids)
    assert values[longest - cache] == 0
    assert values[longest + 1 :] == [-1, -1]
    if (longest, cache) == (100, 20):
        assert [values[n] for n in (80, 81, 90, 99, 100)] == [0, -0.05, -0.5, -0.95, -1]
