"""Recipes with tools in the commands: what `check` reports and refuses, and what uses the tools."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from integration.test_tools import rows
from integration.test_tools_on_processes import save_start
from integration.test_tools_on_processes import values as tool_recipe
from rollout.test_vllm_tools import WHOLE, Cut
from support import fake_vllm
from support.fake_vllm import FakeServer, serving
from support.runs import lines
from uniapl import cli
from uniapl.cli import chat as chat_command
from uniapl.cli import evaluate as evaluate_command
from uniapl.cli.run_settings import RunSettings
from uniapl.compare import prepare, sampling
from uniapl.compare.sampling import Suites
from uniapl.config.resolve import resolve
from uniapl.models.loading import load_model
from uniapl.rollout import engines
from uniapl.training import build_sampler

REWARD = """
def right(completions, total):
    return [float(c[-1]["content"] == str(x)) for c, x in zip(completions, total)]
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a tool, data and a recipe."""
    folder = tmp_path_factory.mktemp("start")
    save_start(folder)
    (folder / "reward.py").write_text(REWARD)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write(folder, "recipe")
    return folder


def write(folder: Path, name: str, **changes: Any) -> str:
    values = tool_recipe(folder, folder / "run")
    values["data"] = {"path": str(folder / "train.jsonl")}
    values["rewards"] = {"functions": [f"{folder / 'reward.py'}:right"]}
    values["evaluation"]["max_completion_length"] = WHOLE
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return str(path)


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert cli.run(words) == code
    shown = capsys.readouterr()
    return " ".join((shown.err if code else shown.out).split())


def test_check_reports_tools(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["check", str(start / "recipe.yaml")], capsys, 0)
    assert "tool 'add': (a, b) Add two numbers." in text
    # The tokens of results are not in the loss.
    assert "</tool_call><|im_end|>]] <|im_start|>user <tool_response> 3 </tool_response><|im_end|>" in text
    assert "<|im_start|>assistant [[3<|im_end|>]]" in text
    assert cli.run(["check", str(start / "recipe.yaml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tools"] == {"add": "(a, b) Add two numbers."}
    # Completions of the maximum length are whole trajectories: 3 prompts, 4 rollouts, 400 tokens, fp32.
    assert report["memory"][0]["stays"]["states of completions"] >= 3 * 4 * 400 * 4
    assert "if every completion has the maximum length" in report["memory"][0]["text"]


BLIND = (
    "{{ tools }}{% for m in messages %}"
    "{% if m['role'] != 'tool' %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<tool_call>"
    "{{ c['function'] | tojson }}</tool_call>{% endfor %}<|im_end|>{% endif %}{% endfor %}"
)
"""Writes calls, and no results."""


def test_check_refuses_what_cannot_work(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(start / "recipe.yaml")
    assert "tool 'nowhere:add': cannot import" in said(
        ["check", path, "--rollout.tools", "nowhere:add"], capsys
    )
    (start / "bare.py").write_text("def bare(a):\n    return a\n")
    bare = said(["check", path, "--rollout.tools", f"{start / 'bare.py'}:bare"], capsys)
    assert "tool 'bare' cannot be described" in bare
    (start / "text.jsonl").write_text("".join(json.dumps({"prompt": "1", "total": n}) + "\n" for n in (1, 2)))
    text = said(["check", path, "--data.path", str(start / "text.jsonl")], capsys)
    assert "row 1: the prompt is plain text, but rollout.tools and rollout.environment need chat" in text
    chat = ["check", path, "--data.path", str(start / "text.jsonl"), "--data.prompt-format", "chat"]
    assert "needs demonstrations" in said(chat, capsys), (
        "the same rows as chats are refused for another reason"
    )
    for template, message in {
        "{% for m in messages %}{{ m['content'] }}{% endfor %}": "the chat template does not show add;",
        "{{ tools }}{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'] }}{% endfor %}": (
            "no known format reads the tool calls"
        ),
        BLIND: "the chat template does not show the results of tools",
        "{{ messages | map(attribute='role') | select('eq', 'tool') | list }}"
        + BLIND: "renders a turn of the assistant differently when the result",
    }.items():
        other = start / "template.jinja"
        other.write_text(template)
        assert message in said(["check", path, "--model.chat-template-path", str(other)], capsys)


def test_stages_have_the_same_tools(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages: list[dict[str, Any]] = [{"method": "sft", "max_steps": 1}, {"method": "grpo", "max_steps": 1}]
    settings = {"rollout": {"tool_timeout": 3.0, "max_tool_calling_iterations": 2}}
    path = write(start, "stages", stages=[stages[0], stages[1] | settings])
    assert "tool 'add'" in said(["check", path], capsys, 0)
    for other in ([], ["math:sqrt"]):
        path = write(start, "stages", stages=[stages[0], stages[1] | {"rollout": {"tools": other}}])
        assert "stage 2 cannot change 'rollout.tools', because" in said(["check", path], capsys)


@pytest.mark.parametrize("sampler", ["local", "vllm"])
def test_evaluate_calls_tools(
    sampler: str, start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the local sampler, and with a server that has the model."""
    for module in (build_sampler, fake_vllm):
        monkeypatch.setattr(module, "LocalSampler", Cut)
    monkeypatch.setattr(engines, "SEEDS", 2**63)
    words = ["evaluate", str(start / "model"), "--recipe", str(start / "recipe.yaml"), "--overwrite"]
    words += ["--num-samples", "4", "--output-dir", str(start / "evaluation"), "--sampler", sampler]
    with serving(FakeServer(start / "model")) as server:
        if sampler == "vllm":
            words += ["--vllm-mode", "server", "--vllm-server-base-url", server.url]
        said(words, capsys, 0)
        assert bool(server.asked) == (sampler == "vllm")
    results = json.loads((start / "evaluation" / "results.json").read_text())
    assert results["settings"]["tools"] == [f"{start / 'mine.py'}:add"]
    found = lines(start / "evaluation" / "completions.jsonl")
    assert {len(one["messages"]) for one in found} == {1, 3}
    for one in found:
        numbers = [m["content"] for m in one["messages"] if m["role"] != "assistant"]
        answer = one["messages"][-1]["content"]
        total = str(int(one["prompt"][0]["content"][0]) + 2)
        assert numbers in ([], [total])
        assert one["reward"] == [float(answer == total)]


def test_completions_with_numbers_that_are_not_finite_are_strict_json(tmp_path: Path) -> None:
    """The policy may write NaN as an argument, which Python's parser reads and others refuse."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found: Any = {"suite": SimpleNamespace(completions=[{"messages": [{"a": float("nan"), "b": "é"}]}])}
    evaluate_command._write(tmp_path, {}, found)
    text = (tmp_path / "completions.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"messages": [{"a": None, "b": "é"}]}


@pytest.mark.parametrize("key", ["tools", "environment"])
def test_results_have_the_tools_with_which_they_were_sampled(key: str) -> None:
    """`--against` reports a difference in any setting of the results."""
    named = {"tools": ["mine.py:add"], "environment": "mine.py:Game"}[key]
    rollout = {key: named, "max_tool_calling_iterations": 3}
    settings = evaluate_command._settings(resolve({"rollout": rollout}).config)
    assert (settings[key], settings["max_tool_calling_iterations"]) == (named, 3)
    assert key not in evaluate_command._settings(resolve({}).config)
    run = RunSettings(file=Path("config.yaml"), prompts={}, stop_strings=(), tools=rollout)
    config = resolve({"rollout": rollout}).config
    (note,) = evaluate_command._notes_on_run(config, Namespace(recipe=None), run)
    assert f"{key} {named}" in note


def test_compared_models_call_tools(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LocalSampler", Cut)
    config = resolve(yaml.safe_load((start / "recipe.yaml").read_text())).config
    suites = Suites.load(config, {}, search=False)
    _, results = suites.sample(load_model(suites.source), seed=0)
    rollouts = results["suite"].rollouts
    assert {len(rollout.messages) for rollout in rollouts} == {1, 3}
    assert all(rollout.tool_use.calls == (len(rollout.messages) == 3) for rollout in rollouts)


@pytest.mark.parametrize("key", ["tools", "environment"])
def test_a_comparison_depends_on_the_files_of_tools(tmp_path: Path, key: str) -> None:
    """A cell that was trained with another version of a tool is not reused."""
    file = tmp_path / "mine.py"
    name = f"{file}:{'add' if key == 'tools' else 'Game'}"
    value: dict[str, Any] = {"tools": [name], "environment": name}
    plan: Any = SimpleNamespace(resolved=resolve({"rollout": {key: value[key]}}), budget=1)
    source = SimpleNamespace(base=str(tmp_path / "model"), adapter=None)
    inputs: Any = SimpleNamespace(
        data_sha256="", suites=(), tokenizer=SimpleNamespace(chat_template=""), source=source
    )

    def digest(text: str) -> str:
        file.write_text(f"def add():\n    return {text}\n\n\nclass Game:\n    value = {text}\n")
        return prepare._fingerprint(plan, inputs)[f"file of '{name}'"]

    first = digest("1")
    assert digest("2") != first
    assert digest("1") == first


def test_chat_says_that_it_calls_no_tools(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    final = tmp_path / "run" / "final"
    shutil.copytree(start / "model", final)
    (tmp_path / "run" / "config.yaml").write_text((start / "recipe.yaml").read_text())
    (tmp_path / "run" / "manifest.json").write_text("{}")
    monkeypatch.setattr(chat_command, "_lines", lambda: iter(()))
    assert cli.run(["chat", str(final)]) == 0
    note = " ".join(capsys.readouterr().err.split())
    assert f"chat neither shows nor calls the tools of {tmp_path / 'run' / 'config.yaml'}; " in note
