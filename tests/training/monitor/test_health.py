"""Health rules: when each fires, and that a run reports it once."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from support.runs import lines, recipe, run_until, timeless, train
from uniapl.config import Config
from uniapl.training.monitor.health import warnings

VALUES: dict[str, Any] = {
    "health": {"window": 5},
    "objective": {"lambda_bounds": (0.1, 8.0)},
    "discriminator": {"kind": "bradley-terry"},
}
CONFIG = Config.model_validate(VALUES)
WINDOW = CONFIG.health.window
NOISE = (0.01, -0.01, 0.0, 0.02, -0.02)


def records(**pairs: tuple[float, float]) -> list[dict[str, Any]]:
    """Two windows; each metric has one mean in the first, another in the second, and some noise."""
    return [
        {name.replace("__", "/"): means[half] + noise for name, means in pairs.items()}
        for half in (0, 1)
        for noise in NOISE
    ]


def fired(given: list[dict[str, Any]]) -> set[str]:
    return set(warnings(given, CONFIG, stage_step=100))


def steps(**values: Any) -> list[dict[str, Any]]:
    """One window of equal steps."""
    return [{name.replace("__", "/"): value for name, value in values.items()}] * WINDOW


WINS_MORE = {"discriminator__win_rate": (0.45, 0.6)}


def test_divergence() -> None:
    assert fired(records(**WINS_MORE, reward=(0.8, 0.6))) == {"divergence"}
    assert fired(records(**WINS_MORE, reward=(0.8, 0.8), sft__nll=(1.0, 1.3))) == {"divergence"}
    assert fired(records(**WINS_MORE, reward=(0.6, 0.8))) == set(), "better in both"
    assert fired(records(**WINS_MORE)) == set(), "neither reward nor demonstrations are known"
    assert fired(records(discriminator__win_rate=(0.2, 0.4), reward=(0.8, 0.6))) == set(), "it still loses"
    assert fired(records(discriminator__win_rate=(0.7, 0.6), reward=(0.8, 0.6))) == set(), "it wins less"
    assert fired(records(reward=(0.8, 0.6))) == set(), "there is no discriminator"
    assert fired(records(**WINS_MORE, reward=(0.8, 0.795))) == set(), "by chance"
    for noisy in (slice(0, 5), slice(5, 10)):
        wild = records(**WINS_MORE, reward=(0.8, 0.7))
        for record, noise in zip(wild[noisy], (0.3, -0.3, 0.0, 0.3, -0.3), strict=True):
            record["reward"] += noise
        assert fired(wild) == set(), "by chance, where one window alone is noisy"


def test_multiplier_pinned() -> None:
    at_bound = [{"constraint/multiplier": 8.0}] * 10
    falling, rising = records(reward=(0.8, 0.6)), records(reward=(0.6, 0.8))
    assert fired([{**a, **b} for a, b in zip(at_bound, falling, strict=True)]) == {"multiplier_pinned"}
    assert fired([{**a, **b} for a, b in zip(at_bound, rising, strict=True)]) == set()
    once_below = [*at_bound[:7], {"constraint/multiplier": 7.9}, *at_bound[8:]]
    assert fired([{**a, **b} for a, b in zip(once_below, falling, strict=True)]) == set()


def test_too_few_steps_and_unknown_values_fire_no_rule() -> None:
    bad = records(**WINS_MORE, reward=(0.8, 0.6))
    assert fired(bad[1:]) == set()
    assert fired([{}, *bad]) == {"divergence"}, "older steps are ignored"
    for unknown in (None, float("nan")):
        assert fired([*bad[:5], *({**r, "reward": unknown} for r in bad[5:])]) == set()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"lambda_adv": 1.0, "adversarial_placement": "multiply"}, {"nothing_passes"}),
        ({"lambda_adv": 0.0, "adversarial_placement": "multiply"}, set()),
        ({"lambda_adv": 1.0, "adversarial_placement": "loss"}, set()),
        ({"lambda_adv": 0.0, "pref_weight": 1.0}, {"nothing_passes"}),
    ],
)
def test_nothing_passes(objective: dict[str, Any], expected: set[str]) -> None:
    config = Config.model_validate({**VALUES, "objective": objective})
    graded = {"reward": 0.4, "reward_std": 0.2, "adversary__active": 1}
    assert set(warnings(steps(**graded, pass_rate=0.0), config, stage_step=100)) == expected
    once = [*steps(**graded, pass_rate=0.0)[1:], *steps(**graded, pass_rate=0.1)[:1]]
    assert warnings(once, config, stage_step=100) == {}
    selecting = Config.model_validate({**VALUES, "batching": {"prompt_selection": "informative"}})
    assert "nothing_passes" in warnings(steps(**graded, pass_rate=0.0), selecting, stage_step=100)


def test_rewards_without_a_gradient() -> None:
    constant = {"reward": 0.0, "reward_std": 0.0}
    assert fired(steps(**constant)) == {"constant_rewards"}
    assert fired(steps(**constant, frac_reward_zero_std=1.0)) == {"constant_rewards", "zero_advantage"}
    assert fired([*steps(**constant)[:4], {"reward": 0.1, "reward_std": 0.0}]) == set(), "they differ"
    assert fired([*steps(**constant)[:4], {"reward": 0.0, "reward_std": 0.1}]) == set(), "within a group"
    rounded = [{"reward": value, "reward_std": 5e-17} for value in (1.0, 0.6 + 0.3 + 0.1) * 3][:5]
    assert fired(rounded) == {"constant_rewards"}
    assert fired(steps(**constant)[:4]) == set(), "too early"
    assert fired(steps(reward=None, reward_std=None)) == set(), "unknown"
    assert fired(steps(frac_reward_zero_std=0.9)) == {"zero_advantage"}
    assert fired(steps(frac_reward_zero_std=0.89)) == set()


def test_completions_that_never_end() -> None:
    assert fired(steps(completions__clipped_ratio=0.51)) == {"truncation"}
    assert fired(steps(completions__clipped_ratio=0.5)) == set()


def test_tools_that_are_not_called() -> None:
    assert fired(steps(tools__call_frequency=0.0)) == {"tools_unused"}
    once = [*steps(tools__call_frequency=0.0)[1:], {"tools/call_frequency": 0.05}]
    assert fired(once) == set(), "0.01 on average"
    assert fired([*once[1:], {"tools/call_frequency": 0.049}]) == set(), "0.0198"
    rare = [*steps(tools__call_frequency=0.0)[1:], {"tools/call_frequency": 0.04}]
    assert fired(rare) == {"tools_unused"}, "0.008 on average"
    assert fired([*steps(tools__call_frequency=0.0)[1:], {}]) == set(), "a step without rollouts"
    config = Config.model_validate({**VALUES, "health": {"window": 5, "min_tool_calls": 0.0}})
    assert warnings(steps(tools__call_frequency=0.0), config, stage_step=100) == {}
    odd = warnings(steps(tools__call_frequency=0.0, tools__malformed=0.25), CONFIG, stage_step=100)
    assert "25% of them end with a call that cannot be read" in odd["tools_unused"]


def test_tools_whose_calls_fail() -> None:
    """Of 5 steps, one has 2 calls per completion; a step without calls has no weight."""
    calls = (2.0, 0.5, 0.5, 0.0, 0.0)

    def failing(*fractions: float) -> set[str]:
        pairs = zip(calls, fractions, strict=True)
        return fired([{"tools/call_frequency": n, "tools/failure_frequency": f} for n, f in pairs])

    assert failing(0.5, 0.5, 0.5, 0.0, 0.0) == set(), "exactly half"
    assert failing(0.75, 0.5, 0.0, 0.0, 0.0) == {"tools_failing"}, "1.75 of 3 calls; 0.25 by steps"
    assert failing(0.25, 1.0, 1.0, 0.0, 0.0) == set(), "1.5 of 3 calls"
    assert fired(steps(tools__call_frequency=1.0, tools__failure_frequency=1.0)[1:]) == set(), "too early"
    assert fired(steps()) == set(), "no tools"


def test_a_policy_that_stops_exploring() -> None:
    assert fired(steps(rollout__entropy_estimate=0.019)) == {"entropy_collapse"}
    assert fired(steps(rollout__entropy_estimate=0.021)) == set()


def test_a_jump_away_from_the_reference() -> None:
    usual = steps(kl=0.05)
    assert fired([*usual, {"kl": 0.51}]) == {"kl_jump"}
    assert fired([*usual, {"kl": 0.49}]) == set()
    assert fired([*usual, {"kl": 0.51}, {"kl": 0.05}]) == set(), "it fires only in its step"
    assert fired([*steps(kl=0.001), {"kl": 0.09}]) == set(), "still small"
    assert fired([*steps(kl=None), {"kl": 5.0}]) == set(), "the first one"


def test_length_explosion() -> None:
    length = "completions__mean_length"
    assert fired(records(**{length: (10.0, 21.0)})) == {"length_explosion"}
    assert fired(records(**{length: (10.0, 19.0)})) == set()
    ratio = "completions__length_ratio"
    assert fired(records(**{ratio: (2.1, 2.3)})) == {"length_explosion"}
    assert fired(records(**{ratio: (2.3, 2.1)})) == set(), "it decreases"
    assert fired(records(**{ratio: (1.1, 1.9)})) == set()


def test_length_collapse() -> None:
    ratio = "completions__length_ratio"
    assert fired(records(**{ratio: (0.9, 0.45)})) == {"length_collapse"}
    assert fired(records(**{ratio: (0.9, 0.55)})) == set(), "more than half"
    assert fired(records(**{ratio: (0.3, 0.4)})) == set(), "it was always short, and grows"
    assert fired(steps(completions__length_ratio=0.3)) == set(), "one window shows no change"


def test_discriminator_dead_or_saturated() -> None:
    def seen(accuracy: float, auc: float) -> set[str]:
        return fired(steps(discriminator__accuracy=accuracy, completions__length_auc=auc) * 2)

    assert seen(0.6, 0.8) == {"discriminator_dead"}
    assert seen(0.6, 0.2) == {"discriminator_dead"}
    assert seen(0.75, 0.8) == set()
    assert seen(0.5, 0.5) == set(), "the policy is as good as the expert"
    assert seen(0.3, 0.5) == {"discriminator_dead"}, "inverted"
    assert seen(0.995, 0.8) == {"discriminator_saturated"}
    assert seen(0.98, 0.8) == set()
    first = steps(discriminator__accuracy=0.6, completions__length_auc=0.8)
    assert fired(first) == set(), "the first window"
    untrained = Config.model_validate(VALUES | {"discriminator": {"kind": "reference-likelihood"}})
    given = steps(discriminator__accuracy=0.3, completions__length_auc=0.8) * 2
    assert warnings(given, untrained, stage_step=100) == {}


def test_sampler_mismatch() -> None:
    key = "trained/sampling_logp_difference/mean"
    assert fired([*steps()[1:], {key: 0.06}]) == {"sampler_mismatch"}
    assert fired([*steps()[1:], {key: 0.04}]) == set()
    assert fired([*steps()[1:], {key: 0.06, "rollout/staleness": 0.0}]) == {"sampler_mismatch"}
    assert fired([*steps()[1:], {key: 0.06, "rollout/staleness": 1.0}]) == set(), "an update is in between"


def test_no_supervised_tokens() -> None:
    assert fired(steps(weight__mu=0.5, tokens__sft=0)) == {"no_supervised_tokens"}
    assert fired(steps(weight__mu=0.0, tokens__sft=0)) == set(), "they have no weight"
    assert fired([*steps(weight__mu=0.5, tokens__sft=0)[1:], {"weight/mu": 0.5, "tokens/sft": 3}]) == set()


INACTIVE = {
    **{"adversary__active": 0, "completions__mean_length": 3.0, "weight__lambda_adv": 0.0},
    **{"discriminator__win_rate": 0.4, "adversary__accuracy": 0.512},
}


def inactive(given: list[dict[str, Any]], *, stage_step: int = 100, **values: Any) -> str | None:
    """The message of the rule; by default a cold start of 4 steps and a warm-up of 3."""
    settings = {
        "health": {"window": 5},
        "batching": {"cold_start_steps": 4},
        "objective": {"adversarial_placement": "multiply"},
        "discriminator": {"kind": "head", "warmup_steps": 3, "min_accuracy": 0.55},
    }
    for key, value in values.items():
        settings[key] = {**settings[key], **value}
    found = warnings(given, Config.model_validate(settings), stage_step=stage_step)
    assert set(found) <= {"adversary_inactive"}
    return found.get("adversary_inactive")


def test_an_adversary_below_its_minimum_accuracy() -> None:
    assert inactive(steps(**INACTIVE)) == (
        "the adversary did not act in the last 5 steps: the discriminator's accuracy is 0.51, below "
        "discriminator.min_accuracy 0.55. Raise discriminator.learning_rate or "
        "discriminator.updates_per_step, or add demonstrations, or lower discriminator.min_accuracy"
    )
    assert "Choose another discriminator" in str(
        inactive(steps(**INACTIVE), discriminator={"kind": "polar"})
    ), "a frozen one cannot be trained more"


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    "better",
    [{"adversary/active": 1}, {"completions/mean_length": None}, {"adversary/active": None}],
    ids=["it acted once", "a step without rollouts", "no adversary"],
)
def test_one_step_is_enough_for_no_warning(place: int, better: dict[str, Any]) -> None:
    given = steps(**INACTIVE)
    given[place] = {key: value for key, value in (given[place] | better).items() if value is not None}
    assert inactive(given) is None


def test_the_adversary_has_time_until_a_window_after_cold_start_and_warm_up() -> None:
    """The cold start ends after step 4 and the warm-up after step 7: steps 8 to 12 are the first window."""
    given = steps(**INACTIVE)
    fires = [step for step in range(5, 15) if inactive(given, stage_step=step)]
    assert fires == [12, 13, 14]
    fires = [s for s in range(5, 15) if inactive(given, stage_step=s, discriminator={"kind": "polar"})]
    assert fires == [9, 10, 11, 12, 13, 14], "no warm-up"
    cold = {"cold_start_steps": 6, "cold_start_prompts_per_step": 2}
    copy = {"kind": "bradley-terry"}
    fires = [s for s in range(5, 15) if inactive(given, stage_step=s, batching=cold, discriminator=copy)]
    assert fires == [11, 12, 13, 14], "its warm-up is a part of the cold start"


def test_an_adversary_without_demonstrations_or_reference() -> None:
    bare = {key: value for key, value in INACTIVE.items() if "win_rate" not in key}
    both = "no completions had a reward above 0 and a demonstration to be compared with. Add a 'completion'"
    assert both in str(inactive(steps(**bare)))
    assert both in str(inactive(steps(**INACTIVE | {"weight__lambda_adv": 1.0}))), "without a reward"
    alone = {"adversarial_placement": "loss"}
    assert "no completions had a demonstration" in str(inactive(steps(**bare), objective=alone))
    late = {"objective": {"reference_step": 20}, "discriminator": {"kind": "reference-likelihood"}}
    found = [inactive(steps(**bare), stage_step=step, **late) for step in range(5, 27)]
    reads = (
        "discriminator.kind reference-likelihood reads the KL reference, which does not exist before step 21"
    )
    assert [message is not None for message in found] == [False] * 4 + [True] * 12 + [False] * 4 + [True] * 2
    assert all(reads in str(message) for message in found[4:16])
    assert both in str(found[-1])


def test_every_warning_has_a_remedy() -> None:
    everything = steps(
        reward=0.0,
        reward_std=0.0,
        frac_reward_zero_std=1.0,
        completions__clipped_ratio=1.0,
        rollout__entropy_estimate=0.0,
        discriminator__accuracy=1.0,
        weight__mu=1.0,
        tokens__sft=0,
        tools__call_frequency=0.005,
        tools__failure_frequency=1.0,
        **INACTIVE,
    )
    found = warnings(everything, CONFIG, stage_step=100)
    assert len(found) == 9
    for message in found.values():
        keys = set(re.findall(r"\b(?:rollout|optim|objective|discriminator|model)\.(\w+)", message))
        sections = [section for section in vars(Config()).values() if isinstance(section, BaseModel)]
        assert keys <= {name for section in sections for name in vars(section)}
        assert keys or "completions" in message


def test_a_run_reports_a_rule_once_also_when_resumed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule also reads steps before the interruption: the metrics equal the uninterrupted run's."""

    def three_of_four(history: list[dict[str, Any]], config: Config, *, stage_step: int) -> Any:
        assert stage_step == history[-1]["step"]
        least = 2 * config.health.window - 1
        return {"rule": f"{len(history)} steps, remedy"} if len(history) >= least else {}

    monkeypatch.setattr("uniapl.training.monitor.health.warnings", three_of_four)
    values = {"max_steps": 6, "health": {"window": 2}}
    train(recipe(model_dir, tmp_path / "whole", **values))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == ["step 3: warning: 3 steps, remedy"]
    written = lines(tmp_path / "whole" / "metrics.jsonl")
    assert [record.get("health/rule") for record in written] == [None, None, 1, 1, 1, 1]
    log = [{"step": 3, "rule": "rule", "message": "3 steps, remedy"}]
    assert lines(tmp_path / "whole" / "health.jsonl") == log
    run_until(4, recipe(model_dir, tmp_path / "broken", **values))
    capsys.readouterr()
    train(recipe(model_dir, tmp_path / "broken", resume="auto", **values))
    assert timeless(lines(tmp_path / "broken" / "metrics.jsonl")) == timeless(written)
    assert lines(tmp_path / "broken" / "health.jsonl") == log
    assert "warning" not in capsys.readouterr().out, "it was reported before the interruption"


def test_a_run_without_a_gradient_ends_with_the_reason(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(completions: list[str]) -> list[float]:
        return [0.25] * len(completions)

    def said(name: str, **changes: Any) -> str:
        values = recipe(model_dir, tmp_path / name, max_steps=2, method="grpo", objective={"beta": 0.0})
        train(values | changes, reward_functions=[failing])
        return capsys.readouterr().out.split("warning: no step had a gradient")[-1]

    tied = said("tied")
    assert "all completions of a prompt had the same reward in every step (mean 0.250)" in tied
    assert tied.index("completions.jsonl") < tied.index("2 steps done")
    stages = [{"method": "grpo", "max_steps": 1}, {"method": "sft", "max_steps": 1}]
    assert "the same reward in every step" not in said("later", stages=stages)
