"""Measures of samples, by hand."""

import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from uniapl.compare.judge import load_judge
from uniapl.compare.measures import closeness, criterion, judged, scores
from uniapl.errors import UniAPLError, UsageError


def entry(**changes: Any) -> dict[str, Any]:
    """Two prompts with two completions each; only the second prompt has an expert's completion."""
    return {
        "headline": "reward",
        "scores": {"reward": [[1.0, 2], [2.0, 2]], "other": [[0.0, 0], [3.0, 1]]},
        "texts": ["a b", "a b c", "x", "c d"],
        "tokens": [3, 4, 2, 6],
        "truncated": [False, True, False, False],
        "base_logprobs": [-9.0, -9.0, -1.0, -3.0],
        "expert": {
            "index": [1],
            "texts": ["c d e"],
            "tokens": [5],
            "logprobs": [-0.5],
            "base_logprobs": [-1.5],
        },
    } | changes


def test_scores_and_their_errors_over_prompts() -> None:
    found = scores({"one": entry()})["one"]
    # Means of the prompts: 0.5 and 1.0; their standard deviation is 0.3536, over the root of 2.
    assert found["reward"] == pytest.approx({"mean": 0.75, "prompt_error": 0.25})
    assert found["other"] == {"mean": 3.0, "prompt_error": None}, "one prompt with a value"
    assert "reward" not in scores({"one": entry(scores={"reward": [[0, 0], [0, 0]]})})["one"]


def test_closeness_over_prompts_with_an_expert() -> None:
    found = closeness({"one": entry()})
    assert found == pytest.approx(
        {
            "truncated": 0.25,
            "tokens": 15 / 4,
            # a b, a b, b c, c d: three of four are distinct.
            "distinct_2": 3 / 4,
            "expert_nll": 0.5,
            # |2 - 5| and |6 - 5|; |-1 + 1.5| and |-3 + 1.5|.
            "length_distance": 2.0,
            "logprob_distance": 1.0,
        }
    )


def test_the_nll_is_a_mean_over_tokens_of_all_suites() -> None:
    second = entry()
    second["expert"] = {**second["expert"], "tokens": [15], "logprobs": [-1.5]}
    found = closeness({"one": entry(), "two": second, "three": entry(expert={"index": []})})
    assert found["expert_nll"] == pytest.approx((5 * 0.5 + 15 * 1.5) / 20)


def test_tool_calls_per_completion_of_the_suites_with_tools() -> None:
    tools = {"calls": [2, 0, 1, 0], "failed": [1, 0, 0, 0], "malformed": [0, 1, 0, 1], "unanswered": [0] * 4}
    more = {**tools, "calls": [4, 4, 4, 1]}
    found = closeness({"one": entry(tools=tools), "two": entry(), "three": entry(tools=more)})
    names = ("calls", "failed", "malformed", "unanswered")
    assert [found[name] for name in names] == [2.0, 0.25, 0.5, 0.0]
    assert not set(names) & closeness({"two": entry()}).keys()


def test_without_an_expert() -> None:
    assert closeness({"one": entry(expert={"index": []})}).keys() == {"truncated", "tokens", "distinct_2"}


def same_words(texts: Sequence[str], experts: Sequence[str]) -> list[float]:
    """A judge: common words over all words."""
    pairs = [(set(a.split()), set(b.split())) for a, b in zip(texts, experts, strict=True)]
    return [len(a & b) / len(a | b) for a, b in pairs]


def test_the_judge_by_hand() -> None:
    sample = {"one": entry()}
    # "x" and "c d" compared with "c d e".
    assert judged(sample, sample, same_words) == {"judge": pytest.approx(1 / 3)}
    three = entry()
    three["expert"] |= {"index": [0, 1], "texts": ["a b c", "c d e"]}
    found = judged({"one": three}, {"one": three}, same_words)
    assert found["judge"] == pytest.approx((2 / 3 + 1 + 0 + 2 / 3) / 4)
    # The expert's texts of different prompts share 1/5, which three of the completions exceed.
    assert found["on_topic"] == 3 / 4
    # A point of a curve has no expert's texts of its own.
    point = {key: value for key, value in three.items() if key != "expert"}
    assert judged({"one": point}, {"one": three}, same_words) == found


def test_a_question_that_is_asked_several_times_leaves_the_threshold_alone() -> None:
    """Of four questions with three rows each, many pairs have the same question."""
    texts = [f"{n} {n}x" for n in range(4) for _ in range(3)]
    whole = entry(
        scores={"reward": [[1.0, 1]] * 12},
        texts=[text.split()[0] for text in texts],
        expert={"index": [*range(12)], "texts": texts},
    )
    assert judged({"one": whole}, {"one": whole}, same_words) == {"judge": 0.5, "on_topic": 1.0}
    whole["expert"]["texts"] = ["a b"] * 12
    assert judged({"one": whole}, {"one": whole}, same_words) == {"judge": 0.0}, "no threshold"


def test_the_judge_is_the_cosine_of_sentence_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            if name != "mine":
                raise OSError("no such model")

        def encode(self, texts: list[str], normalize_embeddings: bool) -> Any:
            assert normalize_embeddings
            return np.array([{"a": [1.0, 0.0], "b": [0.6, 0.8]}[text] for text in texts])

    module = SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert load_judge("mine")(["a", "a"], ["b", "a"]) == pytest.approx([0.6, 1.0])
    with pytest.raises(UsageError, match="--judge: cannot load 'other': no such model"):
        load_judge("other")


def test_the_criterion_of_the_search() -> None:
    assert criterion({"final": {"validation": entry()}}) == 0.75
    unscored = entry(scores={"reward": [[0, 0], [0, 0]]})
    assert criterion({"final": {"validation": unscored}}) == -0.5, "minus the expert's nll"
    with pytest.raises(UniAPLError, match="no reward, metric or demonstration"):
        criterion({"final": {"validation": {**unscored, "expert": {"index": []}}}})
    assert math.isfinite(criterion({"final": {"validation": entry(headline="other")}}))
