"""Evaluation: scores by hand and by lm-eval itself, floors, intervals, overlap, and the command."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from support.benchmark_data import (
    CONSTANT,
    DATA,
    IFEVAL,
    STAND_INS,
    FirstDraw,
    on_stand_ins_and_real_data,
    rows,
)
from support.runs import lines, recipe, train, write_recipe
from support.tiny import LETTERS, letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.cli.evaluate import notes
from uniapl.config import Config, EvaluationConfig, RewardFunctionConfig, RewardsConfig
from uniapl.errors import UsageError
from uniapl.evaluation import evaluate_suite, scores
from uniapl.evaluation.contamination import overlap
from uniapl.evaluation.run import floors, paired
from uniapl.evaluation.suites import Suite, load_suites, parse_suite
from uniapl.rollout import SampleRequest
from uniapl.types import Rollout

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


class Scripted:
    """A sampler that returns the given texts, k per prompt, in the order of the prompts."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts, self.tokenizer = texts, make_tokenizer()
        self.seeds: list[int] = []

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        self.seeds = list(request.seeds)
        assert all(len(group) == request.num_generations for group in self.texts)
        return [tuple(self._rollout(text) for text in group) for group in self.texts]

    def check(self) -> None:
        """There is nothing to check."""

    def _rollout(self, text: str) -> Rollout:
        ids = tuple(self.tokenizer(text).input_ids)
        return Rollout(
            completion_ids=(*ids, 1) if len(ids) < 8 else ids,
            sampling_logprobs=(0.0,) * (len(ids) + (len(ids) < 8)),
            finish_reason="stop" if len(ids) < 8 else "length",
            policy_version=0,
        )


def load_suite(text: str, config: Config, tokenizer: Any, **options: Any) -> Suite:
    evaluation = config.evaluation.model_copy(update={"suites": (text,)})
    return load_suites(config.model_copy(update={"evaluation": evaluation}), tokenizer, **options)[0]


def test_scores_of_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(3)))
    functions = (RewardFunctionConfig(name="lowercase"), RewardFunctionConfig(name="no_comma"))
    suite = load_suite(str(path), Config(rewards=RewardsConfig(functions=functions)), make_tokenizer())
    sampler = Scripted([["ab", "A"], ["abcdefghij", "a,"], ["B,", "B,"]])
    result = evaluate_suite(suite, sampler, sampler.tokenizer, num_samples=2, with_floors=False)
    summary = result.summary
    # lowercase 1 0 | 1 1 | 0 0;   no comma 1 1 | 1 0 | 0 0;   reward 2 1 | 2 1 | 0 0
    assert {name: value["mean"] for name, value in summary["scores"].items()} == {
        "reward": 1.0,
        "rewards/lowercase": 0.5,
        "rewards/no_comma": 0.5,
        "reward_best@2": pytest.approx((2 + 2 + 0) / 3),
    }
    assert summary["per_prompt"]["reward"] == [[3, 2], [3, 2], [0, 2]]
    assert (summary["prompts"], summary["samples"], summary["headline"]) == (3, 2, "reward")
    assert summary["truncated"] == pytest.approx(1 / 6)
    assert summary["mean_length"] == pytest.approx((3 + 2 + 10 + 3 + 3 + 3) / 6), "end tokens count"
    assert [one["completion"] for one in result.completions] == ["ab", "A", "abcdefghij", "a,", "B,", "B,"]
    assert [one["reward"] for one in result.completions] == [[2.0], [1.0], [2.0], [1.0], [0.0], [0.0]]
    assert [one["row"] for one in result.completions] == [1, 1, 2, 2, 3, 3]


def test_unscored_completions_are_not_counted(tmp_path: Path) -> None:
    def fussy(completions: list[str]) -> list[float | Exception]:
        return [ValueError("no") if "x" in text else float("a" in text) for text in completions]

    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(3)))
    suite = load_suite(str(path), Config(), make_tokenizer(), functions=[fussy])
    sampler = Scripted([["a"], ["x"], ["b"]])
    result = evaluate_suite(suite, sampler, sampler.tokenizer, with_floors=False)
    assert result.summary["scores"]["reward"]["mean"] == 0.5
    assert result.summary["unscored"] == pytest.approx(1 / 3)
    assert result.metrics["unscored"] == pytest.approx(1 / 3)
    assert result.completions[1]["reward"] == []


def test_pass_at_k_reports_what_is_unknown(tmp_path: Path) -> None:
    def fussy(completions: list[str]) -> list[float | None]:
        return [None if "x" in text else float("a" in text) for text in completions]

    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(3)))
    suite = load_suite(str(path), Config(), make_tokenizer(), functions=[fussy])
    sampler = Scripted([["a", "b"], ["b", "x"], ["b", "b"]])
    result = evaluate_suite(suite, sampler, sampler.tokenizer, num_samples=2, with_floors=False)
    found = result.summary["scores"]["reward_best@2"]
    assert found["mean"] == 0.5
    assert found["bounds"] == pytest.approx([1 / 3, 2 / 3])
    assert result.summary["per_prompt"]["reward_best@2"] == [[1, 1], [0, 0], [0, 1]]
    assert result.summary["notes"] == [
        "reward_best@2 is the mean over the 2 of 3 prompts whose completions all have a score; over all "
        "prompts with a score it is from 0.333, if the completions without a score all fail, to 0.667, if "
        "they all pass"
    ]
    shown = notes({**result.summary, "floors": {}}, 8)
    assert "1 of 6 completions could not be scored and are not counted" in shown


def test_a_trajectory_is_scored_by_its_messages(tmp_path: Path) -> None:
    """The answer is the last message, and only the policy's words count; instructions are those of it too."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages: tuple[dict[str, Any], ...] = (
        {"role": "assistant", "content": "let me see", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "a, long, result"},
        {"role": "assistant", "content": "=> it is b"},
    )

    class Called(Scripted):
        def _rollout(self, text: str) -> Rollout:
            return replace(super()._rollout(text), messages=messages)

    seen: list[Any] = []

    def last(completions: list[Any]) -> list[float]:
        seen.extend(completions)
        return [float(one[-1]["content"] == "=> it is b") for one in completions]

    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    path = tmp_path / "suite.jsonl"
    asked = [{"role": "user", "content": "what?"}]
    path.write_text(json.dumps({"prompt": asked}) + "\n")
    config = Config(evaluation=EvaluationConfig(suites=(str(path),)))
    (suite,) = load_suites(config, tokenizer, functions=[last])
    seen.clear()
    result = evaluate_suite(suite, Called([["a whole, text"]]), tokenizer, with_floors=False)
    assert seen == [list(messages)]
    assert result.summary["scores"]["reward"]["mean"] == 1.0
    assert result.summary["mean_words"] == len("let me see => it is b".split())
    assert result.completions[0]["messages"] == list(messages)
    row = {"prompt": asked, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    path.write_text(json.dumps(row) + "\n")
    marked = EvaluationConfig(suites=(str(path),), answer_after="=>")
    (suite,) = load_suites(Config(evaluation=marked), tokenizer)
    result = evaluate_suite(suite, Called([["a whole, text"]]), tokenizer, with_floors=False)
    assert result.summary["scores"]["prompt_strict"]["mean"] == 1.0
    assert result.summary["notes"] == []


@on_stand_ins_and_real_data
def test_ifeval_scores_equal_lm_eval(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Various completions of the first prompts, aggregated by us and by lm-eval."""
    tokenizer = make_tokenizer()
    limit = 120 if benchmarks == DATA else 25
    config = Config(evaluation=EvaluationConfig(limit=limit))
    suite = load_suite(f"ifeval={benchmarks / IFEVAL}", config, tokenizer)
    from lm_eval.tasks.ifeval import instructions
    from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

    rng = random.Random(0)
    texts = [rng.choice(["", CONSTANT, str(e.prompt), "so. " * 30, "**so**\nso"]) for e in suite.examples]
    docs = rows(benchmarks / IFEVAL)[:limit]
    ours, failure = suite.score(suite.examples, texts, [(0,)] * len(texts))
    assert failure is None
    monkeypatch.setattr(instructions, "random", FirstDraw)
    expected = [process_results(doc, [text]) for doc, text in zip(docs, texts, strict=True)]
    for kind in ("strict", "loose"):
        prompt = scores.mean_of(scores.sums_of([[one] for one in ours], f"prompt_{kind}"))
        single = scores.mean_of(scores.sums_of([[one] for one in ours], f"inst_{kind}"))
        assert prompt == pytest.approx(np.mean([e[f"prompt_level_{kind}_acc"] for e in expected]))
        assert single == pytest.approx(agg_inst_level_acc([e[f"inst_level_{kind}_acc"] for e in expected]))


FLOORS = {
    "real": {"constant": (0.279, 0.420), "echo": (135 / 541, 301 / 834)},
    "stand-ins": {"constant": (8 / 28, 14 / 34), "echo": (11 / 28, 14 / 34)},
}
"""Strict scores of prompts and of instructions."""


@on_stand_ins_and_real_data
def test_floors_of_ifeval(benchmarks: Path) -> None:
    suite = load_suite(f"ifeval={benchmarks / IFEVAL}", Config(), make_tokenizer())
    found = floors(suite, make_tokenizer())
    assert found["empty"] == {"prompt_strict": 0, "inst_strict": 0, "prompt_loose": 0, "inst_loose": 0}
    for name, expected in FLOORS["real" if benchmarks == DATA else "stand-ins"].items():
        given = (found[name]["prompt_strict"], found[name]["inst_strict"])
        assert given == pytest.approx(expected, abs=0.002), name


def test_intervals_agree_with_a_slow_bootstrap() -> None:
    rng = random.Random(1)
    pairs = [[rng.randint(0, n), n] for n in rng.choices([1, 2, 3], k=40)]
    found = scores.interval(scores.as_sums(pairs))
    assert found["mean"] == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    means = []
    for _ in range(4000):
        drawn = rng.choices(pairs, k=40)
        means.append(sum(a for a, _ in drawn) / sum(b for _, b in drawn))
    means.sort()
    assert found["low"] == pytest.approx(means[100], abs=0.03)
    assert found["high"] == pytest.approx(means[3900], abs=0.03)


def test_difference_is_paired() -> None:
    """The variation between prompts cancels; what remains is that of the differences."""
    rng = random.Random(2)
    theirs = [[rng.random(), 1.0] for _ in range(50)]
    ours = [[value + 0.1 + 0.01 * (-1) ** i, 1.0] for i, (value, _) in enumerate(theirs)]
    found = scores.difference(scores.as_sums(ours), scores.as_sums(theirs))
    # Student's t with 49 degrees of freedom is 2.0096; the standard deviation of +-0.01 is 0.01 sqrt(50/49).
    half = 2.0096 * 0.01 / 49**0.5
    assert found == pytest.approx({"mean": 0.1, "low": 0.1 - half, "high": 0.1 + half}, abs=1e-6)
    alone = scores.interval(scores.as_sums(theirs))
    assert (alone["high"] or 0) - (alone["low"] or 0) > 0.1


def test_equal_values_have_no_narrow_interval() -> None:
    """What is equal on 30 prompts need not be equal on all."""
    none = scores.as_sums([[0, 1]] * 30)
    assert scores.interval(none) == pytest.approx({"mean": 0, "low": 0, "high": 0.1135}, abs=1e-4)
    every = scores.as_sums([[4, 4]] * 30)
    assert scores.interval(every) == pytest.approx({"mean": 1, "low": 0.8865, "high": 1}, abs=1e-4)
    # 32 differences, of which one is 1 and one -1: t(31) = 2.0395 times sqrt(2 / 31 / 32).
    half = 2.0395 * (2 / 31 / 32) ** 0.5
    found = scores.difference(none, none)
    assert found == pytest.approx({"mean": 0, "low": -half, "high": half}, abs=1e-4)
    better = scores.difference(scores.as_sums([[1, 1]] * 30), none)
    assert better["mean"] == better["high"] == 1
    spread = (32 - 30**2 / 32) / 31
    assert better["low"] == pytest.approx(30 / 32 - 2.0395 * (spread / 32) ** 0.5, abs=1e-4)
    # Rewards without known bounds: nothing can be concluded.
    assert scores.interval(scores.as_sums([[-1, 1]] * 30)) == {"mean": -1.0, "low": None, "high": None}
    shifted = scores.difference(scores.as_sums([[2.5, 1]] * 9), scores.as_sums([[2.25, 1]] * 9))
    assert shifted == {"mean": 0.25, "low": None, "high": None}


def drawn(rng: np.random.Generator, rates: np.ndarray, k: int) -> np.ndarray:
    return np.stack([rng.binomial(k, rates), np.full(len(rates), k)], axis=1).astype(float)


def covers(found: scores.Interval, truth: float) -> bool:
    assert found["low"] is not None
    assert found["high"] is not None
    return found["low"] <= truth <= found["high"]


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.98])
def test_completions_of_a_prompt_are_not_independent(rate: float) -> None:
    """Four completions of each of 30 prompts whose rates vary count as fewer than 120 prompts."""
    rng = np.random.default_rng(0)
    covered = sum(
        covers(scores.interval(drawn(rng, rng.beta(rate, 1 - rate, 30), 4)), rate) for _ in range(2000)
    )
    assert 0.93 <= covered / 2000 <= 0.98


@pytest.mark.parametrize(
    ("prompts", "k", "expected"), [(10, 1, (0.94, 1.0)), (30, 1, (0.94, 0.99)), (30, 4, (0.93, 0.98))]
)
def test_coverage_of_differences(prompts: int, k: int, expected: tuple[float, float]) -> None:
    """Two models of which one passes what the other passes and 0.3 of the rest, a true difference of 0.15."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        theirs = rng.beta(0.5, 0.5, prompts)
        found = scores.difference(drawn(rng, 0.3 + 0.7 * theirs, k), drawn(rng, theirs, k))
        covered += covers(found, 0.15)
    assert expected[0] <= covered / 2000 <= expected[1]


def test_paired_matches_prompts() -> None:
    ours = {
        "prompts_digest": ["a", "b", "c"],
        "per_prompt": {"reward": [[1, 1], [1, 1], [0, 1]], "new": [[1, 1]] * 3},
    }
    theirs = {"prompts_digest": ["c", "b", "x"], "per_prompt": {"reward": [[1, 1], [0, 1], [0, 1]]}}
    found = paired(ours, theirs)
    assert found.keys() == {"reward"}
    assert found["reward"]["mean"] == pytest.approx((1 + 0) / 2 - (0 + 1) / 2)
    twice = {"prompts_digest": ["a", "a"], "per_prompt": {"reward": [[1, 1], [0, 1]]}}
    once = {"prompts_digest": ["a"], "per_prompt": {"reward": [[1, 1]]}}
    assert paired(twice, twice)["reward"] == {"mean": 0.0, "low": -1.0, "high": 1.0}
    assert paired(twice, once)["reward"]["mean"] == 0.0, "first occurrences form a pair"
    empty = {"prompts_digest": ["a"], "per_prompt": {"reward": [[0, 0]]}}
    assert paired(empty, empty)["reward"]["mean"] is None


def test_best_of_k() -> None:
    answers = [[{"s": [0.0]}, {"s": [1.0]}], [{"s": [0.0]}, {"s": []}], [{"s": []}, {"s": []}]]
    assert scores.pass_at_all(answers, "s").tolist() == [[1, 1], [0, 0], [0, 0]]


def test_pass_at_k_with_unknown_answers_is_not_biased() -> None:
    """Half of the completions pass, a fifth is unknown: pass@2 is 0.75 for every choice of unknown ones."""
    rng = random.Random(3)

    def completion() -> dict[str, list[float]]:
        return {"s": [] if rng.random() < 0.2 else [float(rng.random() < 0.5)]}

    answers = [[completion(), completion()] for _ in range(4000)]
    assert scores.mean_of(scores.pass_at_all(answers, "s")) == pytest.approx(0.75, abs=0.02)
    low, high = scores.pass_bounds(answers, "s") or (1.0, 0.0)
    # A third of the prompts with a score has an unknown completion: 0.5 of these pass at least, 1 at most.
    assert low == pytest.approx(2 / 3 * 0.75 + 1 / 3 * 0.5, abs=0.02)
    assert high == pytest.approx(2 / 3 * 0.75 + 1 / 3, abs=0.02)


def test_bounds_of_pass_at_k_by_hand() -> None:
    answers = [[{"s": [0.0]}, {"s": [1.0]}], [{"s": [0.0]}, {"s": []}], [{"s": []}, {"s": []}]]
    assert scores.pass_bounds(answers, "s") == (0.5, 1.0), "the third prompt has no score at all"
    assert scores.pass_bounds(answers[:1], "s") is None, "nothing is unknown"
    assert scores.pass_bounds([[{"s": [2.0]}, {"s": []}]], "s") is None, "the best reward is not known"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ifeval", ("ifeval", "google/IFEval")),
        ("ifbench=x/y.jsonl", ("ifbench", "x/y.jsonl")),
        ("mine=some/dataset", ("mine", "some/dataset")),
        ("data/held_out.jsonl", ("held_out", "data/held_out.jsonl")),
    ],
)
def test_suite_names(text: str, expected: tuple[str, str]) -> None:
    assert parse_suite(text) == expected


@pytest.mark.parametrize("text", ["gsm8k", "=x.jsonl", "x=", "folder/name"])
def test_unknown_suites_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"unknown suite '{text}': use ifeval, ifbench"):
        parse_suite(text)


METRICS = """
def letters(completions):
    return [float(len(text)) for text in completions]

def is_asked(completions, wanted):
    return [float(text == one) for text, one in zip(completions, wanted)]
"""


def with_metrics(tmp_path: Path, *names: str, rewards: Sequence[str] = ("lowercase",)) -> Config:
    path = tmp_path / "metrics.py"
    path.write_text(METRICS)
    functions = tuple(RewardFunctionConfig(name=name) for name in rewards)
    evaluation = EvaluationConfig(metrics=tuple(f"{path}:{name}" for name in names))
    return Config(rewards=RewardsConfig(functions=functions), evaluation=evaluation)


def test_metrics_are_scored_and_the_first_is_the_main_score(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "a", "wanted": "ab"}\n{"prompt": "b"}\n')
    suite = load_suite(str(path), with_metrics(tmp_path, "is_asked", "letters"), make_tokenizer())
    assert suite.headline == "is_asked"
    sampler = Scripted([["ab"], ["ABC"]])
    result = evaluate_suite(suite, sampler, sampler.tokenizer, with_floors=False)
    # is_asked applies to the first row only.
    assert result.summary["per_prompt"] == {
        "reward": [[1, 1], [0, 1]],
        "is_asked": [[1, 1], [0, 0]],
        "letters": [[2, 1], [3, 1]],
    }
    assert result.metrics["letters"] == 2.5
    assert [len(rollout.completion_ids) for rollout in result.rollouts] == [3, 4]


def test_a_metric_that_applies_to_no_row_is_noted_and_is_not_the_main_score(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "a"}\n')
    suite = load_suite(str(path), with_metrics(tmp_path, "is_asked"), make_tokenizer())
    assert suite.headline == "reward"
    assert suite.notes == (f"metric '{tmp_path / 'metrics.py'}:is_asked' applies to no row",)


def test_metrics_score_rows_without_rewards_and_instructions(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "a"}\n')
    suite = load_suite(str(path), with_metrics(tmp_path, "letters", rewards=()), make_tokenizer())
    assert suite.headline == "letters"
    assert suite.score(suite.examples, ["abc"], [(1,)])[0] == [{"reward": [], "letters": [3.0]}]


def test_suites_from_rows_need_no_function_that_applies(tmp_path: Path) -> None:
    (suite,) = load_suites(
        Config(), make_tokenizer(), rows={"mine": [(7, {"prompt": "a", "completion": "b"})]}
    )
    assert (suite.name, suite.examples[0].row, suite.examples[0].demonstration) == ("mine", 7, "b")
    assert suite.score(suite.examples, ["x"], [(1,)])[0] == [{"reward": []}]


def test_wrong_metrics_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(
        UsageError, match=r"suite 'held_out'.*has no function 'leters'.*Did you mean 'letters'"
    ):
        load_suite(str(path), with_metrics(tmp_path, "leters"), make_tokenizer())
    config = with_metrics(tmp_path, "letters")
    (tmp_path / "others.py").write_text(METRICS)
    names = (*config.evaluation.metrics, f"{tmp_path / 'others.py'}:letters")
    config = config.model_copy(update={"evaluation": EvaluationConfig(metrics=names)})
    with pytest.raises(UsageError, match="two functions have the same name"):
        load_suite(str(path), config, make_tokenizer())


def test_rows_without_instructions_or_rewards_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(
        UsageError, match=r"suite 'held_out': row 1 has no instructions.*name reward functions"
    ):
        load_suite(str(path), Config(), make_tokenizer())
    with pytest.raises(UsageError, match=r"suite 'gone': .*file not found: 'gone\.jsonl'"):
        load_suite("gone.jsonl", Config(), make_tokenizer())


def test_notes_report_misleading_scores() -> None:
    score = {"mean": 0.2, "low": 0.1, "high": 0.3}
    result = {
        "notes": ["sandbox: landlock"],
        "left_out": {"prompt longer than 5 tokens": [1, 2]},
        "prompts": 10,
        "samples": 2,
        "truncated": 0.4,
        "unscored": 0.25,
        "headline": "reward",
        "scores": {"reward": score},
        "floors": {"empty": {"reward": 0.0}, "echo": {"reward": 0.2}, "constant": {"reward": None}},
    }
    said = notes(result, 64)
    assert said.pop(0) == "sandbox: landlock"
    assert said[0] == "2 prompts are left out: prompt longer than 5 tokens"
    assert "8 of 20 completions were truncated at 64 tokens" in said[1]
    assert said[2].startswith("5 of 20 completions could not be scored")
    assert said[3] == "reward is not above these completions without a model: echo"


def test_overlap_by_hand() -> None:
    theirs = ["Name a river.", "one two three four five six seven eight nine ten eleven twelve thirteen"]
    ours = [
        "name  a RIVER!",
        "Name a lake.",
        "So: one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen. And?",
        "one two three four five six seven eight nine ten eleven twelve",
        "",
    ]
    found = overlap(ours, theirs)
    assert found.exact == {0: 0}
    assert found.ngram == {0: 0, 2: 1}
    assert overlap(ours, theirs, width=12).ngram == {0: 0, 2: 1, 3: 1}
    assert overlap([""], [""]).exact == {}, "texts without words do not overlap"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)


def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {x}.", "letter": x}) + "\n" for x in LETTERS[:9]))
    return path


def test_score_without_values_is_unknown_not_zero() -> None:
    unknown = scores.as_sums([[0, 0], [0, 0]])
    assert scores.interval(unknown) == {"mean": None, "low": None, "high": None}
    one = scores.as_sums([[1, 1], *[[0, 0]] * 500])
    assert scores.interval(one) == pytest.approx({"mean": 1.0, "low": 0.2065, "high": 1.0}, abs=1e-4)
    assert scores.difference(one, scores.as_sums([[0, 1], *[[1, 1]] * 500]))["mean"] == 1.0


def test_suite_without_any_score_fails(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(
        "calls = 0\n"
        "def down(completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    print('noise')\n"
        "    if calls > 1: raise OSError('the server is down')\n"
        "    return [1.0] * len(completions)\n"
    )
    command = [
        "evaluate",
        str(model_dir),
        "--suites",
        str(held_out(tmp_path)),
        "--max-completion-length",
        "4",
    ]
    command += ["--rewards", f"{tmp_path / 'rewards.py'}:down", "--output-dir", str(tmp_path / "out")]
    assert cli.run([*command, "--json"]) == 1
    said = capsys.readouterr()
    assert "suite 'held_out': no completion could be scored" in said.err
    assert "the server is down" in said.err
    assert "noise" not in said.out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["suites"]["held_out"]["scores"]["reward"]["mean"] is None


@on_stand_ins_and_real_data
def test_floors_are_placed_after_the_mark(benchmarks: Path) -> None:
    name = f"ifeval={benchmarks / IFEVAL}"
    evaluation = EvaluationConfig(limit=25, answer_after="</think>")
    suite = load_suite(name, Config(evaluation=evaluation), make_tokenizer())
    plain = load_suite(name, Config(evaluation=EvaluationConfig(limit=25)), make_tokenizer())
    assert floors(suite, make_tokenizer()) == floors(plain, make_tokenizer())
    sampler = Scripted([["b"]] * 25)
    result = evaluate_suite(suite, sampler, sampler.tokenizer, with_floors=False)
    assert result.summary["notes"] == ["25 of 25 completions do not contain '</think>' and count as empty"]
    assert result.summary["scores"]["prompt_strict"]["mean"] == 0


def test_prompts_are_sampled_in_batches_and_kept_in_order(tmp_path: Path) -> None:
    """Batches are sorted by length, results follow the file."""
    path = tmp_path / "many.jsonl"
    prompts = ["a" * (1 + 37 * n % 11) for n in range(150)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    class Echo(Scripted):
        def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
            return [(self._rollout(self.tokenizer.decode(list(prompt))),) for prompt in request.prompts]

    tokenizer = make_tokenizer()

    def ids_are_theirs(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        read = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        return [float(text == said) for text, said in zip(completions, read, strict=True)]

    suite = load_suite(str(path), Config(), tokenizer, functions=[ids_are_theirs])
    advanced: list[float] = []
    sampler = Echo([])
    result = evaluate_suite(suite, sampler, sampler.tokenizer, with_floors=False, advance=advanced.append)
    assert [one["completion"] for one in result.completions] == prompts
    assert advanced == [64, 64, 22]
    assert result.summary["scores"]["reward"]["mean"] == 1.0


def test_run_directory_is_refused_as_output(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    command = ["evaluate", str(model_dir), "--suites", str(held_out(tmp_path)), "--rewards", "no_comma"]
    command += ["--max-completion-length", "4", "--output-dir", str(tmp_path / "run")]
    assert cli.run(command) == 2
    assert "is the directory of a run" in capsys.readouterr().err


def test_comparison_reports_different_settings_and_pairs_prompts(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = held_out(tmp_path), tmp_path / "other.jsonl"
    other.write_text('{"prompt": "say a."}\n{"prompt": "something else"}\n')
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["evaluate", str(model_dir), "--rewards", "no_comma", "--output-dir"]
    assert cli.run([*command, str(first), "--suites", f"x={mine}", "--max-completion-length", "4"]) == 0
    again = [str(second), "--suites", f"x={other}", "--max-completion-length", "5", "--against", str(first)]
    capsys.readouterr()
    assert cli.run([*command, *again]) == 0
    assert "the settings differ: max_completion_length is 5 here and was 4 there" in capsys.readouterr().out
    result = json.loads((second / "results.json").read_text())
    first_prompt = result["suites"]["x"]["per_prompt"]["reward"][0][0]
    theirs = json.loads((first / "results.json").read_text())["suites"]["x"]["per_prompt"]["reward"][0][0]
    assert result["minus"]["suites"]["x"]["reward"]["mean"] == first_prompt - theirs, "one prompt in common"


def test_the_command(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(model_dir), "--suites", str(held_out(tmp_path)), "--rewards", "no_comma"]
    command += ["lowercase", "--max-completion-length", "6"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run([*command, "--output-dir", str(first)]) == 0
    said = capsys.readouterr().out
    assert "held_out: 9 prompts, completions per prompt: 1" in said
    assert "empty" in said
    assert cli.run([*command, "--output-dir", str(second), "--against", str(first), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    difference = shown["minus"]["suites"]["held_out"]["reward"]
    assert difference["mean"] == 0, "greedy"
    assert difference["low"] < 0 < difference["high"], "equal on 9 prompts is not equal on all"
    assert shown["settings"]["prompt_format"] == "chat", "the tokenizer has a template"
    assert lines(first / "completions.jsonl") == lines(second / "completions.jsonl")
    sampled = ["--num-samples", "4", "--seed", "3", "--output-dir", str(tmp_path / "third")]
    assert cli.run([*command, *sampled]) == 0
    result = json.loads((tmp_path / "third" / "results.json").read_text())
    assert result["settings"]["temperature"] == 1.0
    values = result["suites"]["held_out"]["scores"]
    assert values["reward_best@4"]["mean"] >= values["reward"]["mean"]
    assert len({one["completion"] for one in lines(tmp_path / "third" / "completions.jsonl")}) > 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate: give --suites"),
        (["--suites", "gsm8k"], "unknown suite 'gsm8k'"),
        (["--suites", "{file}"], "row 1 has no instructions"),
        (["--suites", "{file}", "--rewards", "nothing"], "unknown reward function 'nothing'"),
        (["--suites", "{file}", "a/other.jsonl", "--rewards", "no_comma"], "file not found"),
        (["--suites", "{file}", "{file}", "--rewards", "no_comma"], "two suites are called 'held_out'"),
        (
            ["--suites", "{file}", "--rewards", "no_comma", "--against", "/nowhere"],
            "--against '/nowhere' cannot",
        ),
        (["--suites", "{file}", "--rewards", "no_comma", "--num-samples", "0"], "num_samples"),
        (["--suites", "{file}", "--rewards", "no_comma", "--batch-size", "0"], "--batch-size must"),
        (["--lm-eval-tasks", "no_such_task"], "lm-eval has no task 'no_such_task'"),
    ],
)
def test_wrong_options(
    flags: list[str], message: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.replace("{file}", str(held_out(tmp_path))) for flag in flags]
    given += ["--max-completion-length", "6", "--output-dir", str(tmp_path / "out")]
    assert cli.run(["evaluate", str(model_dir), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recipe_provides_data_rewards_and_suites(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(
        tmp_path,
        model_dir,
        evaluation={"suites": str(held_out(tmp_path)), "max_completion_length": 3},
        rewards={"functions": [{"name": "no_comma", "weight": 0.5}]},
    )
    out = tmp_path / "out"
    assert cli.run(["evaluate", str(model_dir), "--recipe", str(path), "--output-dir", str(out)]) == 0
    result = json.loads((out / "results.json").read_text())
    assert result["settings"]["prompt_format"] == "text", "as the recipe trains"
    assert result["suites"]["held_out"]["mean_length"] <= 3
    assert result["suites"]["held_out"]["floors"]["constant"] == {"reward": 0.5}


def test_recipe_with_dotted_keys_and_errors(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    values = {"evaluation.suites": str(held_out(tmp_path)), "evaluation.num_samples": 3}
    values |= {"rewards.functions": ["no_comma"], "evaluation.max_completion_length": 3}
    recipe_file.write_text(yaml.safe_dump(values | {"data.prompt_format": "chat"}))
    out = tmp_path / "out"
    command = ["evaluate", str(model_dir), "--recipe", str(recipe_file), "--output-dir", str(out)]
    assert cli.run(command) == 0
    assert cli.run(command) == 2, "results are there already"
    assert "replace them with --overwrite" in capsys.readouterr().err
    assert cli.run([*command, "--overwrite"]) == 0
    result = json.loads((out / "results.json").read_text())
    assert (result["settings"]["num_samples"], result["settings"]["temperature"]) == (3, 1.0)
    assert result["settings"]["prompt_format"] == "chat"
    for wrong in ({"data": "train.jsonl"}, {"rewards": "no_comma"}, {"evaluation": {"num_samples": "four"}}):
        recipe_file.write_text(yaml.safe_dump(wrong))
        assert cli.run(command) == 2
        assert next(iter(wrong)) in capsys.readouterr().err
    assert cli.run([*command, "--suites", "x=y", "--num-samples", "2", "--temperature", "0"]) == 2


def test_evaluation_during_training(model_dir: Path, tmp_path: Path) -> None:
    """Suites are evaluated every eval_steps and at the last step, together with the user's own function."""
    values = recipe(
        model_dir,
        tmp_path / "run",
        max_steps=5,
        eval_steps=2,
        eval_on_start=True,
        evaluation={"suites": [str(held_out(tmp_path))], "max_completion_length": 5},
        rewards={"functions": ["no_comma"]},
    )
    train(values, evaluate=lambda step, model: {"mine": step})
    first, *records = lines(tmp_path / "run" / "metrics.jsonl")
    assert (first["step"], first["eval/mine"]) == (0, 0)
    assert 0 <= first["eval/held_out/reward"] <= 1
    looked = [record["step"] for record in records if "eval/held_out/reward" in record]
    assert looked == [2, 4, 5]
    assert [record["eval/mine"] for record in records] == [1, 2, 3, 4, 5]
    assert all(0 <= records[step - 1]["eval/held_out/truncated"] <= 1 for step in looked)
    final = records[-1]["eval/held_out/reward"]
    command = ["evaluate", str(tmp_path / "run" / "final"), "--suites", str(held_out(tmp_path)), "--rewards"]
    command += ["no_comma", "--max-completion-length", "5", "--prompt-format", "text"]
    assert cli.run([*command, "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["held_out"]
    scored = found["scores"]["rewards/no_comma" if "rewards/no_comma" in found["scores"] else "reward"]
    assert math.isclose(scored["mean"], records[-1].get("eval/held_out/rewards/no_comma", final))


def test_evaluation_without_suites_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"eval_steps: evaluation\.suites is empty"):
        train(recipe(model_dir, tmp_path / "run", eval_steps=2))


def test_check_reports_overlap(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"suites": [str(held_out(tmp_path))], "max_completion_length": 6}
    path = write_recipe(tmp_path, model_dir, evaluation=evaluation)
    assert cli.run(["check", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overlap"]["held_out"]["exact"] == [[n, n] for n in range(1, 10)], "letters a to i"
    assert cli.run(["check", str(path)]) == 0
    said = capsys.readouterr().out
    expected = "warning: suite 'held_out': 9 of 12 training prompts are also in the suite, 0 more share"
    assert expected in " ".join(said.split())


def test_lm_eval_tasks_run_on_the_model(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's IFEval and ours agree on the same model and file."""
    import lm_eval.tasks.ifeval

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join((STAND_INS / IFEVAL).read_text().splitlines()[:6]) + "\n")
    task = {
        "include": f"{next(iter(lm_eval.tasks.ifeval.__path__))}/ifeval.yaml",
        "task": "ifeval_few",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(data)}},
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 8},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "few.yaml").write_text(yaml.safe_dump(task))
    big = save_model(tmp_path / "model", chat_template=TEMPLATE)
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    command = ["evaluate", str(big), "--suites", f"ifeval={data}", "--max-completion-length", "8"]
    command += ["--lm-eval-tasks", "ifeval_few", "--lm-eval-include-path", str(tmp_path / "tasks")]
    assert cli.run([*command, "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    ours, theirs = found["suites"]["ifeval"]["scores"], found["lm_eval"]["ifeval_few"]
    for level in ("prompt", "inst"):
        for kind in ("strict", "loose"):
            assert theirs[f"{level}_level_{kind}_acc"] == pytest.approx(ours[f"{level}_{kind}"]["mean"])
