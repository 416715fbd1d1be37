"""The demo task with tools: tools, solvers, tokens, splits, base model and command."""

import itertools
import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.runs import lines
from uniapl import cli
from uniapl.cli.demo import demo
from uniapl.compare.measures import closeness
from uniapl.compare.sampling import Suites
from uniapl.config import DataConfig
from uniapl.config.resolve import load_recipe, merge, resolve
from uniapl.data.rendering import ChatTemplate
from uniapl.data.rows import tokenize_row
from uniapl.demo.answers import answered, number_in, solved
from uniapl.demo.arithmetic import (
    HELD_OUT_PEOPLE,
    PEOPLE,
    TABLE,
    Question,
    calculate,
    draw_question,
    lookup,
)
from uniapl.demo.language import NOUNS
from uniapl.demo.measure_tools import measure_tools
from uniapl.demo.recipe import TOOLS_RECIPE
from uniapl.demo.solvers import Sloppiness, solve, solve_sloppily, written
from uniapl.demo.tools import as_row, make_tool_task, make_tool_tokenizer, rendered
from uniapl.errors import UsageError
from uniapl.models.loading import ModelSource, load_model
from uniapl.tools.calls import CallParser
from uniapl.tools.functions import call_tool, find_tools
from uniapl.types import Example

QUESTION = Question(terms=(37, 24, ("king", "age")), operations=("times", "plus"))
TOOLS = {tool.name: tool for tool in find_tools(TOOLS_RECIPE["rollout"]["tools"])}
SCHEMAS = [dict(tool.schema) for tool in TOOLS.values()]
BASE = Path(str(files("uniapl.demo") / "base-tools"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tool_tokenizer()


def example_of(row: dict[str, Any], tokenizer: Any) -> Example:
    return tokenize_row(1, {**row, "tools": SCHEMAS}, tokenizer, DataConfig())


def called(name: str, arguments: dict[str, Any]) -> str:
    return call_tool(TOOLS, name, arguments, timeout=10.0, max_characters=100).content


def test_the_tools_by_hand() -> None:
    assert calculate("37 * 24 + 41") == 929
    assert calculate("10 - 2 * 3 - 4") == 0
    assert calculate("5") == 5
    assert {lookup(name, quantity) for name, quantity in TABLE} <= set(range(11, 99))
    assert called("lookup", {"name": "age", "quantity": "king"}) == '{"error": "no such entry"}'
    for wrong in ("", "3 +", "3 4", "3+4", "3 / 4", "2 * * 3", "-3"):
        assert called("calculate", {"expression": wrong}) == '{"error": "not an expression"}', wrong


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=5),
    st.lists(st.sampled_from("+-*"), min_size=4, max_size=4),
)
def test_calculate_is_pythons_arithmetic(numbers: list[int], signs: list[str]) -> None:
    parts = itertools.chain(*zip(signs, map(str, numbers), strict=False))
    expression = " ".join([*parts][1:])
    assert calculate(expression) == eval(expression)


def test_a_question_by_hand() -> None:
    age = TABLE["king", "age"]
    assert QUESTION.text == "what is 37 times 24 plus the age of the king?"
    assert QUESTION.expression(TABLE) == f"37 * 24 + {age}"
    assert QUESTION.answer == 888 + age
    call, result, sum_, total, answer = solve(QUESTION)
    assert call["tool_calls"][0]["function"] == {
        "name": "lookup",
        "arguments": {"name": "king", "quantity": "age"},
    }
    assert result["content"] == str(age)
    assert sum_["tool_calls"][0]["function"]["arguments"] == {"expression": f"37 * 24 + {age}"}
    assert total["content"] == str(888 + age)
    assert answer == {"role": "assistant", "content": f"the answer is {888 + age}"}


def test_the_experts_results_are_those_of_the_tools_and_its_reward_is_1() -> None:
    task = make_tool_task(questions=400, demonstrations=400)
    for row in (*task.rows, *(as_row(question, solved=True) for question in task.held_out_people)):
        waiting: list[dict[str, Any]] = []
        for message in row["completion"]:
            waiting += message.get("tool_calls", [])
            if message["role"] == "tool":
                function = waiting.pop(0)["function"]
                assert message["name"] == function["name"]
                assert message["content"] == called(function["name"], function["arguments"])
        assert not waiting
        assert solved([row["completion"]], [row["answer"]]) == [1.0]


def test_answers_by_hand() -> None:
    right = [{"role": "assistant", "content": "the answer is -12"}]
    texts = [
        "it is -12",
        "-12",
        "the answer is 12",
        "-12 -12",
        "the answer is",
        "",
        " -12",
        "-12</tool_call>",
    ]
    assert [number_in(text) for text in texts] == [-12, -12, 12, None, None, None, None, None]
    assert solved([right, *texts], [-12] * 9) == [1.0, 1.0, 1.0, *[0.0] * 6]
    assert answered([right, *texts]) == [1.0, 1.0, 1.0, 1.0, *[0.0] * 5]
    call = {"role": "assistant", "content": '<tool_call>{"name": "lookup"'}
    assert answered([[*right, call]]) == [0.0], "only the last turn is an answer"


def test_the_tokens_of_a_trajectory_are_those_of_the_base_models_training(tokenizer: Any) -> None:
    """Also: no unknown token, and every trajectory fits into the recipe's limit."""
    task = make_tool_task(questions=400, demonstrations=400)
    for question in (*task.train, *task.held_out_people):
        example = example_of(as_row(question, solved=True), tokenizer)
        shown = example.demonstration_tokens
        assert shown is not None
        parts = [
            (token, w)
            for text, w in rendered(question, solve(question))
            for token in tokenizer(text).input_ids
        ]
        assert [token for token, _ in parts] == [*shown.prompt, *shown.completion]
        assert [w for _, w in parts] == [False] * len(shown.prompt) + shown.is_written
        assert tokenizer.unk_token_id not in (*shown.prompt, *shown.completion)
        assert len(shown.completion) <= TOOLS_RECIPE["rollout"]["max_completion_length"]
        assert question.text in tokenizer.decode(list(shown.prompt))


def test_the_sloppy_solver_makes_each_mistake_and_gives_no_fact_away(tokenizer: Any) -> None:
    form = ChatTemplate(tokenizer=tokenizer, arguments={}, tools=SCHEMAS)
    parser = CallParser.of(form, {tokenizer.eos_token_id})
    rng = random.Random(0)
    ends = {"call": 0, "answer": 0, "solved": 0}
    for _ in range(1500):
        question = draw_question(rng, NOUNS)
        messages = solve_sloppily(question, rng, Sloppiness())
        text = messages[-1]["content"]
        if "<tool_call>" in text:
            ends["call"] += 1
            assert parser.read(tokenizer(f"{text}<eos>").input_ids).malformed
        else:
            ends["answer"] += 1
            assert number_in(messages) is not None
            ends["solved"] += not question.facts and number_in(messages) == question.answer
        for message in messages:
            if calls := message.get("tool_calls"):
                ids = tokenizer(f"{written(message)}<eos>").input_ids
                assert tokenizer.unk_token_id not in ids
                assert parser.read(ids) == (calls, False)
    assert 100 < ends["call"] < 300
    assert 100 < ends["solved"] < 300
    perfect = Sloppiness(guess=0, skip=0, wrong=0, malformed=0, stop=0, slip=0)
    plain = Question(terms=(37, 24), operations=("times",))
    assert number_in(solve_sloppily(plain, rng, perfect)) == 888
    found = {solve_sloppily(QUESTION, rng, perfect)[1]["content"] for _ in range(100)}
    assert len(found) > 20, "the same fact differs from trajectory to trajectory"


def test_splits_share_no_question_and_held_out_people_are_unknown() -> None:
    task = make_tool_task(questions=300, demonstrations=20, held_out=60)
    splits = (task.train, task.held_out, task.held_out_people)
    assert [len(split) for split in splits] == [300, 60, 60]
    assert len({question.text for split in splits for question in split}) == 420
    known, new = (
        {name for question in split for name, _ in question.facts}
        for split in ((*task.train, *task.held_out), task.held_out_people)
    )
    assert (known, new) == (set(PEOPLE), set(HELD_OUT_PEOPLE))
    assert sorted({len(question.facts) for question in task.train}) == [0, 1, 2]
    assert sum(len(question.facts) == 1 for question in task.held_out_people) == 30
    assert ["completion" in row for row in task.rows] == [True] * 20 + [False] * 280
    assert make_tool_task(questions=300, demonstrations=20, held_out=60) == task


def test_the_shipped_model_is_small_and_seldom_right() -> None:
    """The shares on all held-out questions are in its README; these are fewer."""
    assert sum(len(file.read_bytes()) for file in BASE.iterdir()) < 2**20
    assert load_model(ModelSource(base=str(BASE))).num_parameters() < 400_000
    found, texts = measure_tools(BASE, resolve(TOOLS_RECIPE).config, make_tool_task(questions=1, held_out=96))
    assert 0.02 < found.solved < 0.25
    assert 0.3 < found.calls < 1.3
    assert 0.03 < found.malformed < 0.3
    assert found.malformed <= found.unanswered < 0.5
    assert found.expert_nll < 1
    assert any('<tool_call>{"name": "lookup"' in text and "    -> " in text for text in texts)


def test_the_demo_with_tools_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_tool_task(questions=24, demonstrations=12, held_out=16)
    flags = ["--task", "tools", "--output-dir", str(tmp_path / "run"), "--max-steps", "2"]
    measured = demo([*flags, "--batching.prompts-per-step", "2"], task=task)
    assert measured["base"] != measured["uniapl"]
    output = capsys.readouterr().out
    assert task.held_out[0].text in output
    assert "ends with the right answer" in output
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_the_task_is_written_as_files_that_compare_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_tool_task(questions=6, demonstrations=4, held_out=8)
    assert demo(["--task", "tools", "--write", "task", "--max-steps", "7"], task=task) == {}
    assert "uniapl compare task/recipe.yaml" in capsys.readouterr().out
    assert lines(Path("task/train.jsonl")) == task.rows
    config = resolve(load_recipe("task/recipe.yaml")).config
    assert config.max_steps == 7
    assert config.rollout.tools == tuple(TOOLS_RECIPE["rollout"]["tools"])
    suites = Suites.load(config, {}, search=False)
    assert [(suite.name, suite.headline) for suite in suites.suites] == [
        ("held_out", "solved"),
        ("held_out_people", "solved"),
    ]
    rows = lines(Path("task/held_out.jsonl"))
    expert = [row["completion"] for row in rows]
    scores, failure = suites.suites[0].score(suites.suites[0].examples, expert, [(1,)] * 8)
    assert failure is None
    assert [score["solved"] for score in scores] == [[1.0]] * 8, "metrics get messages"
    model = load_model(ModelSource(base=str(BASE)))
    sample, results = suites.sample(model, seed=0)
    calls = [m for r in results["held_out"].rollouts for m in r.messages if m["role"] == "tool"]
    assert sum(sample["held_out"]["tools"]["calls"]) == len(calls) > 0
    assert results["held_out"].metrics["tools/call_frequency"] == len(calls) / 8
    suites.add_likelihoods(sample, results, model, model)
    assert closeness(sample)["calls"] == pytest.approx(
        sum(sum(entry["tools"]["calls"]) for entry in sample.values()) / 16
    )
    assert (
        cli.run(["evaluate", "task/base", "--recipe", "task/recipe.yaml", "--output-dir", "evaluated"]) == 0
    )
    summary = json.loads(Path("evaluated/results.json").read_text())["suites"]["held_out"]
    assert summary["tools"]["tools/call_frequency"] == len(calls) / 8, "the same seeds"


def test_bad_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, error in (
        (["--task", "tool"], "--task: unknown task 'tool': choose one of sentences, tools"),
        (["--task"], "--task: unknown task ''"),
        (["--task", "tools", "--reward", "half"], "--reward half is for --task sentences"),
        (["--task", "tools", "--write"], "--write needs a directory"),
    ):
        with pytest.raises(UsageError, match=error):
            demo(flags)
    assert cli.run(["demo", "--task", "tool", "--help"]) == 2
    assert cli.run(["demo", "--task", "tools", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--write DIRECTORY" in shown
    assert "rewards.functions: [uniapl.demo.answers" in shown, "the recipe of the task"
    assert max(map(len, shown.splitlines())) <= 100


def test_the_recipe_of_each_task_is_valid() -> None:
    config = resolve(merge(dict(TOOLS_RECIPE), {"model": {"model_name_or_path": "x"}})).config
    assert config.method == "uniapl"
    assert config.rollout.max_completion_length == config.evaluation.max_completion_length
