"""Reward functions: lookup, calls, and the one rule for all their failures."""

import asyncio
import functools
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, TrainerState

from support.tiny import SMALL, make_tokenizer
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder, extra_columns
from uniapl.rewards.base import named_reward
from uniapl.rewards.finding import find_function
from uniapl.training.monitor.metrics import reward_health
from uniapl.types import Example


def example(row: int = 1, prompt: Any = "p", **columns: Any) -> Example:
    return Example(
        row=row, prompt=prompt, prompt_ids=(5,), demonstration=None, demonstration_ids=None, columns=columns
    )


def score(
    function: Callable[..., Any],
    examples: Sequence[Example] | None = None,
    texts: Sequence[str] = ("a", "bb", "ccc"),
    **settings: Any,
) -> Any:
    rewarder = Rewarder([named_reward("f", function)], **settings)
    examples = examples or [example(n) for n in range(len(texts))]
    outcome = rewarder.score(examples, texts, [(1,)] * len(texts))["f"]
    return outcome, rewarder.combine({"f": outcome}, len(texts))


def test_arguments_are_passed_by_name() -> None:
    seen: dict[str, Any] = {}

    def some(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0, 0.5]

    def everything(**kwargs: Any) -> list[float]:
        seen.update(everything=sorted(kwargs))
        return [0.0, 0.0]

    examples = [example(1, "p1", answer=3, other=1), example(2, "p2", answer=4)]
    assert score(some, examples, ("a", "b"))[1] == [1.0, 0.5]
    assert seen == {"prompts": ["p1", "p2"], "completions": ["a", "b"], "answer": [3, 4]}
    score(everything, examples, ("a", "b"))
    ours = ["completion_ids", "completions", "log_extra", "log_metric", "prompts", "trainer_state"]
    assert seen["everything"] == sorted([*ours, "answer", "other"])


def test_completion_of_a_chat_prompt_is_a_message() -> None:
    chat = [{"role": "user", "content": "p"}]
    got: list[Any] = []
    score(lambda completions: got.extend(completions) or [0.0], [example(1, chat)], ("a",))
    assert got == [[{"role": "assistant", "content": "a"}]]


def test_row_without_a_required_column_has_no_reward() -> None:
    def f(completions: list[str], answer: list[int]) -> list[float]:
        return [float(a) for a in answer]

    outcome, combined = score(f, [example(1, answer=3), example(2), example(3, answer=None)])
    assert combined == [3.0, None, None]
    assert outcome.failed == [False] * 3


def test_combine_weighs_values_and_skips_none() -> None:
    first = named_reward("first", lambda completions: [1.0, None, None], weight=2.0)
    second = named_reward("second", lambda completions: [0.5, 0.5, None], weight=1.0)
    rewarder = Rewarder([first, second])
    outcomes = rewarder.score([example(n) for n in range(3)], ["a"] * 3, [(1,)] * 3)
    assert rewarder.combine(outcomes, 3) == [2.5, 0.5, None]


def test_async_functions_are_awaited() -> None:
    async def f(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    assert score(f)[1] == [1.0, 2.0, 3.0]
    assert score(f, timeout=None)[1] == [1.0, 2.0, 3.0]


def test_one_bad_completion_costs_only_its_own_reward() -> None:
    def f(completions: list[str]) -> list[float]:
        if "bb" in completions:
            raise ZeroDivisionError("no bb")
        return [1.0] * len(completions)

    outcome, combined = score(f)
    assert combined == [1.0, None, 1.0]
    assert outcome.failed == [False, True, False]
    assert outcome.message.startswith("ZeroDivisionError: no bb (test_rewards.py, line ")


def test_failed_function_makes_the_reward_unknown() -> None:
    """The other function's value would be a wrong sum."""
    bad = named_reward("bad", lambda completions: [float("nan"), 1.0])
    good = named_reward("good", lambda completions: [1.0, 1.0])
    rewarder = Rewarder([bad, good])
    outcomes = rewarder.score([example(1), example(2)], ["a", "b"], [(1,)] * 2)
    assert rewarder.combine(outcomes, 2) == [None, 2.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "1 values for 3 completions"),
        ([1.0] * 4, "more than 3 values for 3"),
        (1.0, "returned float"),
        (None, "returned NoneType"),
        ("abc", "returned str"),
        ({"a": 1}, "returned dict"),
        ([1.0, "yes", 0.0], "'yes' where a number"),
        ([1.0, "1.0", 0.0], "'1.0' where a number"),
        ([1.0, [2.0], 0.0], r"\[2.0\] where a number"),
        ([1.0, b"1", 0.0], "b'1' where a number"),
        ([1.0, torch.ones(2), 0.0], "where a number"),
        ({0.0, 0.5, 1.0}, "returned set"),
    ],
)
def test_wrong_results_are_no_rewards(result: Any, message: str) -> None:
    import re

    outcome, combined = score(lambda completions: result)
    assert combined == [None, None, None]
    assert re.search(message, outcome.message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_no_rewards(value: float) -> None:
    outcome, combined = score(lambda completions: [1.0, value, 0.0])
    assert combined == [1.0, None, 0.0]
    assert outcome.failed == [False, True, False]
    assert str(value) in outcome.message


def test_numpy_and_torch_numbers_are_numbers() -> None:
    assert score(lambda completions: numpy.array([1, 0, 1]))[1] == [1.0, 0.0, 1.0]
    assert score(lambda completions: torch.tensor([0.5, 0.0, 1.0]))[1] == [0.5, 0.0, 1.0]
    assert score(lambda completions: [True, numpy.float32(0.5), None])[1] == [1.0, 0.5, None]


@pytest.mark.parametrize("is_async", [False, True])
def test_hanging_function_is_abandoned_after_the_timeout(is_async: bool) -> None:
    async def slowly(completions: list[str]) -> list[float]:
        await asyncio.sleep(30)
        return [1.0] * 3

    def slow(completions: list[str]) -> list[float]:
        time.sleep(30)
        return [1.0] * 3

    begin = time.monotonic()
    outcome, combined = score(slowly if is_async else slow, timeout=0.2)
    assert time.monotonic() - begin < 5
    assert combined == [None] * 3
    assert outcome.timed_out == [True] * 3
    assert "0.2 s" in outcome.message


def test_function_that_exits_does_not_end_the_run() -> None:
    outcome, combined = score(lambda completions: sys.exit(3))
    assert combined == [None] * 3
    assert "SystemExit" in outcome.message


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, BaseException])
def test_function_that_raises_a_base_exception_does_not_end_the_run(error: type[BaseException]) -> None:
    def reward(completions: list[str]) -> list[float]:
        raise error

    outcome, combined = score(reward)
    assert combined == [None] * 3
    assert error.__name__ in outcome.message


def test_functions_are_found_by_registry_module_and_file(tmp_path: Path) -> None:
    assert find_function("no_comma")(["a,b", "ab", " "]) == [0.0, 1.0, 0.0]
    assert find_function("os.path:basename")("a/b") == "b"
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [7.0]\n")
    assert find_function(f"{tmp_path / 'mine.py'}:f")([""]) == [7.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_coma", "unknown reward function 'no_coma': use one of .*Did you mean 'no_comma'"),
        ("nowhere.module:f", "cannot import 'nowhere.module'"),
        ("nowhere.py:f", "file not found"),
        ("os.path:nothing", "has no function 'nothing'"),
        ("os.path:basenam", "it defines: .*basename.*Did you mean 'basename'"),
    ],
)
def test_unknown_functions_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_function(name)


def test_arguments_are_bound_and_checked() -> None:
    reward = named_reward("length", find_function("length"), args={"max_words": 2})
    assert reward.required_columns == ()
    rewarder = Rewarder([reward])
    outcome = rewarder.score([example(1)] * 3, ["a b", "a b c", ""], [(1,)] * 3)["length"]
    assert outcome.values == [1.0, 0.0, 0.0]
    with pytest.raises(UsageError, match="takes no argument 'maximum'"):
        named_reward("length", find_function("length"), args={"maximum": 2})


def test_name_instead_of_function_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"'length' is not a function: names of functions belong in rewards\.functions"
    ):
        inspect.unwrap(named_reward)("length", "length")


def test_same_function_twice_gets_two_metric_names() -> None:
    reward = named_reward("length", find_function("length"), args={"max_words": 2})
    assert [r.name for r in Rewarder([reward, reward]).rewards] == ["length", "length_2"]


def test_column_without_values_is_refused() -> None:
    def f(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(completions)

    rewarder = Rewarder([named_reward("f", f)])
    with pytest.raises(UsageError, match=r"'f' needs a column 'answer'.*besides .*: solution.*data.columns"):
        rewarder.check_columns([example(1, solution="x")])


def test_builtin_rewards_by_hand() -> None:
    assert find_function("lowercase")(["abc 1.", "Abc", "12", ""]) == [1.0, 0.0, 0.0, 0.0]
    assert find_function("no_comma")([[{"role": "assistant", "content": "a, b"}]]) == [0.0]


def test_a_soft_overlong_punishment_lowers_the_sum() -> None:
    """An answer of 90 tokens is right, one of 100 is right but truncated, one of 95 is wrong."""

    def right(completions: list[str]) -> list[float]:
        return [float(c == "right") for c in completions]

    args = {"max_completion_len": 100, "soft_punish_cache": 20}
    name = "get_soft_overlong_punishment"
    punish = named_reward(name, find_function(name), weight=0.5, args=args)
    rewarder = Rewarder([named_reward("right", right), punish])
    ids = [[1] * length for length in (90, 100, 95)]
    outcomes = rewarder.score([example()] * 3, ["right", "right", "wrong"], ids)
    assert outcomes[name].values == [-0.5, -1.0, -0.75]
    assert rewarder.combine(outcomes, 3) == [0.75, 0.5, -0.375]
    broken = named_reward(name, find_function(name), args={**args, "soft_punish_cache": 101})
    message = r"soft_punish_cache 101 must be from 0 to max_completion_len \(100\)"
    with pytest.raises(UsageError, match=message):
        Rewarder([broken]).try_out([example()])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_reward_model_scores_as_in_trl(tmp_path: Path, batch_size: int) -> None:
    """Scoring one sequence at a time, without padding, gives the same logits."""
    config = Qwen3Config(**SMALL, num_labels=1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    template = "{% for m in messages %}<turn>{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.save_pretrained(tmp_path)
    user = [{"role": "user", "content": "hi"}]
    prompts = ["say a", "b", user]
    completions = ["aaa", "abcabcabc", [{"role": "assistant", "content": "yo"}]]
    score = functools.partial(find_function("reward_model"), model=str(tmp_path), batch_size=batch_size)

    def check(logits: list[float], *texts: str) -> None:
        for text, logit in zip(texts, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits
            assert logit == pytest.approx(float(expected), abs=1e-5)
        assert len(set(logits)) == len(texts)

    check(score(prompts, completions), "say aaaa", "babcabcabc", "<turn>hi<turn>yo")
    begun = [*user, {"role": "assistant", "content": "well "}]
    check(score([begun], completions[2:]), "<turn>hi<turn>well yo")
    turn = {"role": "assistant", "content": "call f", "tool_calls": [{"function": {"name": "f"}}]}
    turns = [turn, {"role": "tool", "name": "f", "content": "5"}, {"role": "assistant", "content": "yo"}]
    check(score([user], [turns]), "<turn>hi<turn>call f<turn>5<turn>yo")
    check(
        score(prompts[:2], completions[:2], prompt_format="chat"),
        "<turn>say a<turn>aaa",
        "<turn>b<turn>abcabcabc",
    )


def test_other_models_are_refused_as_reward_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt_format must be 'text' or 'chat', not 'Text'"):
        find_function("reward_model")(["a"], ["b"], model="x", prompt_format="Text")
    with pytest.raises(UsageError, match="cannot load the reward model's tokenizer"):
        find_function("reward_model")(["a"], ["b"], model=str(tmp_path / "nowhere"))
    config = Qwen3Config(**SMALL, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has 2 outputs; a reward model must have one"):
        find_function("reward_model")(["a"], ["b"], model=str(tmp_path))


def test_one_time_out_does_not_relabel_the_other_failures() -> None:
    """The function raises on the batch and on "a", hangs on "bb", and is not called after that."""

    def f(completions: list[str]) -> list[float]:
        if completions == ["bb"]:
            time.sleep(30)
        if completions == ["good"]:
            return [1.0]
        raise ValueError("no")

    outcome, combined = score(f, texts=("good", "a", "bb", "ccc"), timeout=0.3)
    assert combined == [1.0, None, None, None]
    assert outcome.failed == [False, True, True, True]
    assert outcome.timed_out == [False, False, True, False]
    health = reward_health({"f": [outcome]})
    assert health["rewards/f/error_rate"] == 0.5
    assert health["rewards/f/timeout_rate"] == 0.25
    assert health["rewards/f/none_rate"] == 0.0


def test_functions_get_trl_s_arguments() -> None:
    seen: list[Any] = []

    def f(
        completions: list[str], *, trainer_state: Any, log_extra: Any, log_metric: Any = None
    ) -> list[float]:
        seen.append(trainer_state)
        log_extra("words", numpy.array([len(c) for c in completions]))
        log_extra("odd", [float("nan"), {1: Path("x")}, torch.tensor([0.5])])
        log_metric("mean_words", torch.tensor(2.0))
        log_metric("mean_words", numpy.float32(4.0))
        return [1.0] * len(completions)

    reward = named_reward("f", f)
    assert reward.required_columns == ()
    rewarder = Rewarder([reward])
    outcome = rewarder.score([example(n) for n in range(3)], ["a", "bb", "ccc"], [(1,)] * 3)["f"]
    assert isinstance(seen[0], TrainerState)
    assert seen[0] is rewarder.trainer_state
    assert outcome.values == [1.0] * 3, outcome.message
    assert outcome.extra == {"words": [1, 2, 3], "odd": [None, {"1": repr(Path("x"))}, [0.5]]}
    assert outcome.metrics == {"mean_words": [2.0, 4.0]}


def test_logs_are_those_of_calls_that_succeeded_and_keep_their_samples() -> None:
    """The call of the batch fails after it has logged; row 2 has no answer; "bad" raises on its own too."""

    def f(completions: list[str], answer: list[int], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("answers", answer)
        log_metric("calls", 1.0)
        if "bad" in completions:
            raise ValueError("bad")
        return [1.0] * len(completions)

    examples = [example(1, answer=10), example(2), example(3, answer=30), example(4, answer=40)]
    outcome = score(f, examples, ("a", "b", "bad", "d"))[0]
    assert outcome.extra == {"answers": [10, None, None, 40]}
    assert outcome.metrics == {"calls": [1.0, 1.0]}
    assert outcome.values == [1.0, None, None, 1.0]


def test_a_log_with_a_wrong_number_of_values_is_a_failure() -> None:
    def f(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("words", [1])
        return [1.0] * len(completions)

    outcome, combined = score(f)
    assert combined == [None] * 3
    assert outcome.message == "log_extra('words'): 1 values, 3 completions"


def test_columns_of_two_functions_with_one_name_are_both_kept() -> None:
    def f(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("parsed", completions)
        return [1.0] * len(completions)

    outcomes = Rewarder([named_reward("f", f), named_reward("g", f)]).score([example(1)], ["a"], [(1,)])
    assert extra_columns(outcomes) == {"parsed": ["a"], "g/parsed": ["a"]}


@pytest.mark.case(25)
@pytest.mark.parametrize(
    ("parameter", "meant"),
    [
        ("prompt", "prompts"),
        ("completion", "completions"),
        ("completions_ids", "completion_ids"),
        ("state", None),
        ("answers", "answer"),
        ("train_state", "trainer_state"),
    ],
)
def test_a_misspelt_argument_gets_a_suggestion(parameter: str, meant: str | None) -> None:
    scope: dict[str, Any] = {}
    exec(f"def f(completions, {parameter}): return [0.0] * len(completions)", scope)
    with pytest.raises(UsageError, match=f"needs a column '{parameter}'") as caught:
        Rewarder([named_reward("f", scope["f"])]).check_columns([example(1, answer="x")])
    assert (f"Did you mean '{meant}'?" if meant else "besides prompt and completion: answer).") in str(
        caught.value
    )
    assert ("Did you mean" in str(caught.value)) == (meant is not None)
    assert "not columns: prompts, completions, completion_ids, trainer_state, log" in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: [float(len(c[0]["content"])) for c in completions],
        lambda completions: [float(len(c["content"])) for c in completions],
        lambda completions: [float(len(c[-1].get("content"))) for c in completions],
        lambda prompts: [float(len(p[-1]["content"])) for p in prompts],
    ],
)
def test_access_to_messages_of_text_prompts_says_what_to_write(function: Callable[..., Any]) -> None:
    rewarder = Rewarder([named_reward("f", function)])
    with pytest.raises(
        UsageError, match=r"use c instead of c\[0\]\['content'\], or set data.prompt_format to chat"
    ):
        rewarder.try_out([example(1)])
    with pytest.raises(UsageError, match=r"division by zero \(test_rewards.py, line \d+\)$"):
        Rewarder([named_reward("f", lambda completions: [1 / 0])]).try_out([example(1)])


def test_a_function_cannot_change_the_prompts() -> None:
    chat = [{"role": "user", "content": "p"}]

    def f(prompts: list[Any]) -> list[float]:
        for prompt in prompts:
            prompt.append({"role": "assistant", "content": "x"})
        return [float(len(prompt)) for prompt in prompts]

    row = example(1, chat)
    assert score(f, [row, row], ("a", "b"))[1] == [2.0, 2.0]
    assert chat == [{"role": "user", "content": "p"}]
