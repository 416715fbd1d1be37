"""Prompts that are replaced or skipped by their rewards: which ones, their cost, resuming, processes."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fake_vllm import FakeServer, behind, serving
from support.processes import run_processes
from support.runs import assert_same_run, lines, recipe, run_until, timeless, train
from support.tiny import letter_rows, save_model
from uniapl.data.streams import Stream
from uniapl.rollout import SampleRequest, engines
from uniapl.rollout.local import LocalSampler
from uniapl.training import loop
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.types import Example, derive_seed

EASY = "acdfgij"
"""Letters whose rollouts all get the same reward, 7 of the 12 prompts."""


def alternating(completions: list[str], letter: list[str]) -> list[float]:
    """1 for easy letters; otherwise 0 and 1 in turn, so that no group has equal rewards."""
    return [1.0 if x in EASY else float(n % 2) for n, x in enumerate(letter)]


def rows_of(run: Path, step: int, *, discarded: bool) -> list[int]:
    records = lines(run / "completions.jsonl")
    return [r["row"] for r in records if r["step"] == step and r.get("discarded", False) == discarded]


def order() -> Iterator[int]:
    """Rows in the order in which the stream of a run with seed 0 draws them."""
    examples = [
        Example(row=n, prompt="", prompt_ids=(n,), demonstration=None, demonstration_ids=None, columns={})
        for n in range(1, 13)
    ]
    return (example.row for example in Stream(examples, seed=0, name="prompts").take(200))


def easy(row: int) -> bool:
    return letter_rows()[row - 1]["letter"] in EASY


def expected_steps(*, steps: int, times: int) -> list[tuple[list[int], list[int]]]:
    """Trained and replaced rows of each step, slowly."""
    following, found = order(), []
    for _ in range(steps):
        kept, replaced = [next(following) for _ in range(3)], []
        for _ in range(times):
            for place in [n for n, row in enumerate(kept) if easy(row)]:
                replaced.append(kept[place])
                kept[place] = next(following)
        found.append((kept, replaced))
    return found


@pytest.mark.parametrize("times", [0, 1, 2, 9])
def test_groups_with_equal_rewards_are_replaced(
    times: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[list[int]] = []
    sample = LocalSampler.sample

    def watched(self: LocalSampler, request: SampleRequest) -> Any:
        seeds.append([*request.seeds])
        return sample(self, request)

    monkeypatch.setattr(LocalSampler, "sample", watched)
    run = tmp_path / "run"
    train(
        recipe(model_dir, run, method="grpo", rollout={"max_resample_times": times}),
        reward_functions=[alternating],
    )
    wanted = expected_steps(steps=4, times=times)
    for step, (kept, replaced) in enumerate(wanted, start=1):
        assert rows_of(run, step, discarded=False) == kept
        assert rows_of(run, step, discarded=True) == replaced
    if times == 9:
        assert not any(easy(row) for kept, _ in wanted for row in kept)
    # Each prompt of a step has its own seeds, whether or not it was replaced.
    every = [derive_seed(0, "rollout", s, n) for s, (a, b) in enumerate(wanted) for n in range(len(a + b))]
    assert [*itertools.chain(*seeds)][-len(every) :] == every


def test_replaced_groups_are_counted_and_not_trained(model_dir: Path, tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    values = recipe(model_dir, run, method="grpo", rollout={"max_resample_times": 2})
    train(values, reward_functions=[alternating])
    train(recipe(model_dir, plain, method="grpo"), reward_functions=[alternating])
    total = 0
    for record in lines(run / "metrics.jsonl"):
        step = record["step"]
        groups = [r for r in lines(run / "completions.jsonl") if r["step"] == step]
        dropped = [r for r in groups if r.get("discarded")]
        tokens, lost = (
            sum(c["tokens"] for r in part for c in r["completions"]) for part in (groups, dropped)
        )
        assert record["discarded/groups"] == len(dropped) > 0
        assert record["discarded/rollouts"] == 4 * len(dropped)
        assert (record["tokens/rollout"], record["tokens/discarded"]) == (tokens, lost)
        assert record["tokens/rl"] == tokens - lost
        prompts = sum(4 * len(r["prompt"]) for r in groups)
        total += tokens + prompts
        assert record["num_tokens"] == total
        # Of all groups that were sampled, 3 of which are kept.
        equal = sum(easy(r["row"]) for r in groups)
        assert record["frac_reward_zero_std"] == equal / (3 + len(dropped))
        rewards = [c["reward"] for r in groups for c in r["completions"]]
        assert record["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert record["rewards/alternating/none_rate"] == 0
        assert all(c["advantage"] is None is c["win_rate"] for r in dropped for c in r["completions"])
        assert record["time/rewards/alternating"] > 0
    assert not [key for record in lines(plain / "metrics.jsonl") for key in record if "discarded" in key]
    assert not [r for r in lines(plain / "completions.jsonl") if "discarded" in r]


def test_a_group_remains_when_no_prompt_is_better(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = recipe(model_dir, run, method="grpo", rollout={"max_resample_times": 2})
    train(values, reward_functions=[lambda completions, **_: [1.0] * len(completions)])
    for record in lines(run / "metrics.jsonl"):
        assert (record["discarded/groups"], record["tokens/rl"] > 0) == (6, True)


def zero(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_a_prompt_that_goes_to_its_demonstration_is_not_replaced(model_dir: Path, tmp_path: Path) -> None:
    """With the gate; rows with an even number have no demonstration."""
    run = tmp_path / "run"
    gate: dict[str, Any] = {"mu_controller": "gate", "lambda_adv": 0.0}
    train(recipe(model_dir, run, objective=gate, rollout={"max_resample_times": 2}), reward_functions=[zero])
    replaced = [row for step in range(1, 5) for row in rows_of(run, step, discarded=True)]
    assert replaced
    assert all(row % 2 == 0 for row in replaced)
    for record in lines(run / "metrics.jsonl"):
        assert (record["tokens/sft"] > 0) == any(
            row % 2 for row in rows_of(run, record["step"], discarded=False)
        )


def test_a_prompt_whose_rollouts_are_compared_with_its_demonstration_is_not_replaced(
    model_dir: Path, tmp_path: Path
) -> None:
    """Rows with an even number have no demonstration."""
    run = tmp_path / "run"
    pairs = {"pref_weight": 1.0}
    values = recipe(model_dir, run, method="grpo", objective=pairs, rollout={"max_resample_times": 2})
    train(values, reward_functions=[zero])
    replaced = [row for step in range(1, 5) for row in rows_of(run, step, discarded=True)]
    assert replaced
    assert all(row % 2 == 0 for row in replaced)
    # Where all completions pass there is no pair.
    values |= {"output_dir": str(tmp_path / "passing")}
    train(values, reward_functions=[lambda completions, **_: [1.0] * len(completions)])
    replaced = [r for step in range(1, 5) for r in rows_of(tmp_path / "passing", step, discarded=True)]
    assert any(row % 2 for row in replaced)


def test_a_step_whose_rewards_have_no_weight_replaces_nothing(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = recipe(
        model_dir,
        run,
        rollout={"max_resample_times": 2},
        objective={"mu_peak": 1.0, "mu_decay_steps": 0},
        batching={"cold_start_steps": 2, "cold_start_prompts_per_step": 3},
    )
    train(values, reward_functions=[zero])
    assert [r["discarded/groups"] for r in lines(run / "metrics.jsonl")] == [0, 0, 6, 6]


def test_prompts_that_always_pass_are_skipped(model_dir: Path, tmp_path: Path) -> None:
    """The whole sequence, against a slow reference of rates and draws."""
    run = tmp_path / "run"
    values = recipe(model_dir, run, method="grpo", max_steps=20, batching={"prompt_selection": "informative"})
    train(values, reward_functions=[alternating])
    counts: dict[int, tuple[float, float]] = {}
    turns, position = [*order()], 0
    for record in lines(run / "metrics.jsonl"):
        drawn: list[int] = []
        first = position
        while len(drawn) < 3:
            row = turns[position]
            passes, failures = counts.get(row, (0.0, 0.0))
            chance = 1 - ((passes + 1) / (passes + failures + 2)) ** 4 if row in counts else 1.0
            if derive_seed(0, "prompts", "turn", position) / 2**63 < chance:
                drawn.append(row)
            position += 1
        assert rows_of(run, record["step"], discarded=False) == drawn
        assert record["prompts/skipped"] == position - first - 3
        assert record["epoch"] == position / 12
        for row in drawn:
            passes, failures = counts.get(row, (0.0, 0.0))
            new = 4 if easy(row) else 2
            counts[row] = (passes / 2 + new, failures / 2 + 4 - new)
        rates = [passes / (passes + failures) for passes, failures in counts.values()]
        assert record["prompts/pass_rate"] == pytest.approx(sum(rates) / len(rates), abs=1e-12)
        assert record["prompts/never_passed"] == 0
    assert position > 60, "some were skipped"
    state = json.loads((checkpoint.checkpoint_path(run, 20) / "state.json").read_text())
    assert sorted(map(tuple, state["pass_rates"].values())) == sorted(counts.values())


def test_demonstrations_of_prompts_that_never_pass_come_first(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    rows = loop.demonstration_rows

    def watched(example: Example) -> Any:
        trained.append(example.row)
        return rows(example)

    monkeypatch.setattr(loop, "demonstration_rows", watched)
    demonstrations = [e for e in letter_rows() if "completion" in e]
    for selection in ("uniform", "informative"):
        trained.clear()
        run = tmp_path / selection
        values = recipe(
            model_dir, run, batching={"prompt_selection": selection, "demonstrations_per_step": 2}
        )
        train(values, reward_functions=[zero])
        assert len(trained) == 4 * 2, "the number does not change"
        failed = [[row for row in rows_of(run, step, discarded=False) if row % 2][:2] for step in range(1, 5)]
        assert any(failed)
        steps = [trained[n : n + 2] for n in range(0, 8, 2)]
        first = [step[: len(rows)] == rows for step, rows in zip(steps, failed, strict=True)]
        assert all(first) == (selection == "informative")
    assert len(demonstrations) == 6


def both(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Replaced and skipped prompts, with a discriminator; the pass rates differ between the prompts."""
    return recipe(
        model,
        output,
        max_steps=6,
        rollout={"max_resample_times": 2} | changes.pop("rollout", {}),
        batching={"prompt_selection": "informative"},
        objective={"pass_threshold": 0.1},
        **changes,
    )


@pytest.mark.parametrize("killed_in", [2, 5, 9])
def test_a_killed_run_continues_to_the_same_result(killed_in: int, model_dir: Path, tmp_path: Path) -> None:
    """Killed in some call of the reward, also between two samplings of a step."""
    train(both(model_dir, tmp_path / "whole"))
    run_until(killed_in, both(model_dir, tmp_path / "broken"))
    train(both(model_dir, tmp_path / "broken", resume="auto"))
    assert_same_run(tmp_path / "broken", tmp_path / "whole", 6)
    records = lines(tmp_path / "whole" / "metrics.jsonl")
    assert sum(record["discarded/groups"] for record in records) > 0
    assert all("prompts/pass_rate" in record for record in records)


def test_rollouts_one_step_ahead(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next prompts are known after the rewards; replacements come from the current weights."""
    monkeypatch.setattr(engines, "PAUSE", 0.02)
    with serving(FakeServer(save_model(tmp_path / "theirs", seed=9))) as server:
        answer, asked = server.answer, []

        def counted(prompt: Any, body: dict[str, Any]) -> Any:
            asked.append(body["n"])
            return answer(prompt, body)

        server.answer = counted  # type: ignore[method-assign]
        ahead = behind(server, max_off_policy_steps=1)
        whole, broken = (both(model_dir, tmp_path / name, rollout=ahead) for name in ("whole", "broken"))
        train(whole)
        # The canary has one completion.
        assert asked.count(4) == len(lines(tmp_path / "whole" / "completions.jsonl")), "none in vain"
        run_until(6, broken)
        train(broken | {"resume": "auto"})
    ours, theirs = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("broken", "whole"))
    assert ours == theirs
    for record in theirs:
        kept_first = 3
        sampled = kept_first + record["discarded/groups"]
        stale = 0 if record["step"] == 1 else kept_first / sampled
        assert record["rollout/staleness"] == pytest.approx(stale)


def _train(folder: Path, values: dict[str, Any]) -> None:
    train(values)


@pytest.mark.distributed
def test_two_processes_decide_alike(model_dir: Path, tmp_path: Path) -> None:
    """A single replacement leaves one process without a prompt."""
    train(both(model_dir, tmp_path / "one"))
    assert run_processes(2, _train, tmp_path, both(model_dir, tmp_path / "two")) == [0, 0]
    one, two = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert {record["discarded/groups"] % 2 for record in one} == {0, 1}
    for mine, other in zip(two, one, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key
    texts = [
        [
            (r["row"], [c["text"] for c in r["completions"]])
            for r in lines(tmp_path / name / "completions.jsonl")
        ]
        for name in ("one", "two")
    ]
    assert texts[0] == texts[1]


def test_a_stage_ends_with_its_rollouts(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = recipe(
        model_dir,
        run,
        method="grpo",
        rollout={"max_resample_times": 2},
        early_stopping={"max_rollouts": 40},
    )
    train(values, reward_functions=[zero])
    # 9 groups of 4 in each step.
    records = lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert records[-1]["early_stopping/reason"] == "budget: sampled 72 rollouts, the limit is 40"


def test_settings_without_an_effect_are_noted(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gad = recipe(
        model_dir,
        tmp_path / "run",
        method="gad",
        max_steps=1,
        objective={"lambda_adv": 1.0, "adversarial_credit": "standardized"},
        rollout={"max_resample_times": 2},
        batching={"prompt_selection": "informative"},
    )
    train(gad, reward_functions=[])
    shown = " ".join(capsys.readouterr().out.split())
    assert "note: rollout.max_resample_times has no effect: method 'gad' does not train on rewards" in shown
    assert "note: batching.prompt_selection informative has no effect: without rewards.functions" in shown
