"""The values of a schedule by hand, and how a learned lambda_adv follows the win rate, without a run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from uniapl import Config
from uniapl.config.resolve import resolve
from uniapl.discriminator.bradley_terry import AdversaryState
from uniapl.functional import Multiplier
from uniapl.training.schedule import Schedule
from uniapl.types import Example, RolloutGroup


def with_accuracy(accuracy: float, config: Config) -> Any:
    """An adversary after a step in which the average of its accuracy was this."""
    state = AdversaryState(accuracy=accuracy)
    state.compare_accuracy(config.discriminator.min_accuracy)
    return SimpleNamespace(state=state)


def schedule(controller: str, *, accuracy: float = 1.0, step: int = 10) -> Schedule:
    objective: dict[str, Any] = {"lambda_controller": controller, "max_expert_gap": 0.1}
    objective |= {"lambda_learning_rate": 1.0}
    values = {
        "objective": {**objective, "lambda_gains": (0.0, 1.0, 0.0)},
        "discriminator": {"kind": "bradley-terry", "warmup_steps": 5},
    }
    config, multiplier = Config.model_validate(values), Multiplier(value=2.0)
    subject = Schedule(config=config, adversary=None, multiplier=multiplier, step=step)
    vars(subject)["adversary"] = with_accuracy(accuracy, config)
    return subject


@pytest.mark.parametrize("controller", ["dual", "pid"])
@pytest.mark.parametrize("win_rate", [0.1, 0.4, 0.45, 0.9])
def test_lambda_falls_as_fast_as_it_grows(controller: str, win_rate: float) -> None:
    """A win rate of 0.9 is as far beyond 0.5 as 0.1 is below it."""
    subject = schedule(controller)
    logged = subject.control_lambda(win_rate)
    violation = 0.5 - win_rate - 0.1
    expected = 2.0 * math.exp(violation) if controller == "dual" else 2.0 + violation
    assert subject.multiplier.value == pytest.approx(expected)
    assert logged == pytest.approx(
        {
            "constraint/expert_gap": max(0.0, 0.5 - win_rate),
            "constraint/violation": violation,
            "constraint/multiplier": expected,
        }
    )


@pytest.mark.parametrize("inactive", [{"accuracy": 0.5}, {"step": 4}], ids=["guessing", "warm-up"])
def test_lambda_does_not_change_while_its_weight_is_0(inactive: dict[str, Any]) -> None:
    subject = schedule("dual", **inactive)
    assert subject.control_lambda(0.1)["constraint/multiplier"] == 2.0
    assert subject.multiplier == Multiplier(value=2.0)


def test_without_pairs_or_with_a_fixed_lambda_nothing_is_logged() -> None:
    assert schedule("dual").control_lambda(None) == {}
    assert schedule("fixed").control_lambda(0.1) == {}


def at(step: int, adversary: Any = None, **values: Any) -> Schedule:
    multiplier = Multiplier(value=2.0)
    return Schedule(
        config=Config.model_validate(values), adversary=adversary, multiplier=multiplier, step=step
    )


def test_the_learning_rate_by_hand() -> None:
    values = {
        "max_steps": 10,
        "optim": {"learning_rate": 0.5, "warmup_steps": 2, "lr_scheduler_type": "linear"},
    }
    assert [at(step, **values).learning_rate for step in (0, 1, 2, 6, 10)] == pytest.approx(
        [0.0, 0.25, 0.5, 0.25, 0.0]
    )


@pytest.mark.parametrize(
    ("step", "accuracy", "weight"),
    [(4, 0.9, 0.0), (5, 0.9, 2.0), (5, 0.55, 2.0), (5, 0.549, 0.0)],
)
def test_lambda_acts_after_the_warm_up_from_the_minimum_accuracy_on(
    step: int, accuracy: float, weight: float
) -> None:
    trained = {"kind": "bradley-terry", "warmup_steps": 5, "min_accuracy": 0.55}
    values: dict[str, Any] = {"discriminator": trained}
    subject = at(step, **values)
    vars(subject)["adversary"] = with_accuracy(accuracy, subject.config)
    assert subject.lambda_adv == weight
    vars(subject)["adversary"] = None
    assert subject.lambda_adv == 0.0
    frozen = at(step, discriminator=values["discriminator"] | {"kind": "polar"})
    vars(frozen)["adversary"] = with_accuracy(0.9, frozen.config)
    assert frozen.lambda_adv == 2.0, "a frozen discriminator has no warm-up"


def test_lambda_does_not_flicker_around_the_minimum_accuracy() -> None:
    """On at 0.55, off at 0.5 and below; a minimum of 0 is always on."""
    accuracies = [0.5, 0.54, 0.55, 0.53, 0.56, 0.51, 0.5, 0.52, 0.549, 0.6, 0.2, 0.9]
    expected = {
        0.55: [0, 0, 2, 2, 2, 2, 0, 0, 0, 2, 0, 2],
        0.6: [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2],
        0.0: [2] * 12,
    }
    for minimum, weights in expected.items():
        subject = at(5, discriminator={"warmup_steps": 5, "min_accuracy": minimum})
        state = AdversaryState()
        vars(subject)["adversary"] = SimpleNamespace(state=state)
        found: list[float] = []
        for state.accuracy in accuracies:
            state.compare_accuracy(minimum)
            found.append(subject.lambda_adv)
        assert found == weights


def test_an_adversary_that_is_the_only_component_needs_no_accuracy() -> None:
    alone: dict[str, Any] = {"mu_peak": 0.0, "mu_valley": 0.0, "reward_weight": 0.0}
    settings: dict[str, Any] = {"warmup_steps": 5, "min_accuracy": 0.55}
    for objective, weight in (
        (alone, 2.0),
        ({**alone, "reward_weight": 1.0}, 0.0),
        ({**alone, "mu_peak": 0.1}, 0.0),
        ({**alone, "teacher_kl": 0.1}, 0.0),
        ({**alone, "pref_weight": 0.1}, 0.0),
    ):
        subject = at(5, objective=objective, discriminator=settings)
        vars(subject)["adversary"] = with_accuracy(0.1, subject.config)
        assert subject.lambda_adv == weight


def rewarded(*rewards: float | None, demonstration: bool = True) -> RolloutGroup:
    example = Example(
        row=1,
        prompt="p",
        prompt_ids=(5,),
        demonstration="d" if demonstration else None,
        demonstration_ids=(7, 1) if demonstration else None,
        columns={},
    )
    return RolloutGroup(example=example, rollouts=(), rewards=rewards, reward_parts={})


def test_mu_of_each_controller_by_hand() -> None:
    limits = {"mu_threshold": 0.8, "mu_peak": 0.9, "mu_valley": 0.1}
    groups = [rewarded(1.0, 0.0, None), rewarded(0.5, demonstration=False)]
    by_reward = at(3, objective={"mu_controller": "reward", **limits})
    assert by_reward.mu(groups) == pytest.approx(0.3)
    # Groups that were replaced count: (1 + 0 + 0.5 + 1 + 1) / 5 = 0.7.
    assert by_reward.mu(groups, [rewarded(1.0, 1.0)]) == pytest.approx(0.1)
    assert by_reward.mu([groups[0]], [rewarded(0.5, 0.9)]) == pytest.approx(0.2)
    assert by_reward.mu([rewarded(None)]) == 0.9
    assert by_reward.mu([rewarded(1.0)]) == 0.1
    gate = at(3, objective={"mu_controller": "gate", "gate_threshold": 0.0})
    assert gate.mu([rewarded(0.0, None), rewarded(0.0, 1.0), rewarded(0.0, demonstration=False)]) == 1 / 3
    steps = {"mu_warmup_steps": 2, "mu_decay_steps": 2, "mu_peak": 0.8, "mu_valley": 0.2}
    mus = [at(step, objective=steps).mu([]) for step in range(5)]
    assert mus == pytest.approx([0.0, 0.4, 0.8, 0.5, 0.2])


def test_the_weights_by_hand() -> None:
    steps = {"mu_warmup_steps": 0, "mu_decay_steps": 0, "mu_peak": 0.25, "mu_valley": 0.25}
    objective: dict[str, Any] = {**steps, "reward_weight": 3.0, "beta": 0.05}
    subject = at(20, objective=objective, discriminator={"warmup_steps": 5, "min_accuracy": 0.5})
    vars(subject)["adversary"] = with_accuracy(0.9, subject.config)
    weights = {"sft": 0.25, "rl": 0.75 * 3.0, "adv": 2.0, "kl": 0.0, "teacher": 0.0, "entropy": 0.0}
    assert subject.weights([]) == weights | {"pref": 0.0}
    subject.uses_reference = True
    assert subject.weights([])["kl"] == 0.05
    paired = at(20, objective={**objective, "pref_weight": 0.3})
    assert paired.weights([])["pref"] == 0.0, "there is no reference yet"
    paired.uses_reference = True
    assert paired.weights([])["pref"] == 0.3
    inside = at(20, objective={**objective, "adversarial_placement": "reward"})
    vars(inside)["adversary"] = with_accuracy(0.9, inside.config)
    assert inside.weights([])["adv"] == 0.0


def test_a_stage_ends_at_its_last_step_or_by_its_stop_rule() -> None:
    assert [at(step, max_steps=3).ended for step in (2, 3, 4)] == [False, True, True]
    stopped = at(1, max_steps=3)
    stopped.stopping.reason = "enough"
    assert stopped.ended


def test_the_cold_start_has_its_own_numbers_and_learning_rate() -> None:
    """Four steps on demonstrations, then six: the linear rate falls to 0 in each part, as in two stages."""
    batching = {"cold_start_steps": 4, "cold_start_demonstrations_per_step": 24}
    values: dict[str, Any] = {
        "max_steps": 10,
        "batching": batching | {"prompts_per_step": 3, "demonstrations_per_step": 2},
        "optim": {"learning_rate": 1.0, "lr_scheduler_type": "linear"},
        "objective": {"mu_peak": 0.9, "mu_valley": 0.1, "mu_decay_steps": 0},
    }
    subject = Schedule(config=Config.model_validate(values), adversary=None, multiplier=Multiplier(value=1.0))
    found = []
    for subject.step in range(10):
        found.append(
            (
                subject.prompts_per_step(subject.step),
                subject.demonstrations_per_step,
                round(subject.mu([]), 6),
                round(subject.learning_rate, 6),
            )
        )
    cold = [(0, 24, 0.9, rate) for rate in (1.0, 0.75, 0.5, 0.25)]
    warm = [(3, 2, 0.1, round(1 - n / 6, 6)) for n in range(6)]
    assert found == cold + warm


def test_the_cold_start_may_be_a_fraction_and_has_as_many_demonstrations_as_completions() -> None:
    values: dict[str, Any] = {"max_steps": 30, "batching": {"cold_start_steps": 0.2, "prompts_per_step": 3}}
    values["rollout"] = {"num_generations": 4}
    config = Config.model_validate(values)
    subject = Schedule(config=config, adversary=None, multiplier=Multiplier(value=1.0), step=5)
    assert (config.cold_start_steps, config.reference_step) == (6, 6)
    assert (subject.in_cold_start, subject.demonstrations_per_step) == (True, 12)
    subject.step = 6
    assert (subject.in_cold_start, subject.demonstrations_per_step) == (False, 8)


def test_a_cold_start_may_have_rollouts() -> None:
    subject = at(3, batching={"cold_start_steps": 4, "cold_start_prompts_per_step": 1})
    assert (subject.prompts_per_step(3), subject.prompts_per_step(4)) == (1, 8)


@pytest.mark.parametrize(
    ("kind", "batching", "objective", "first"),
    [
        ("bradley-terry", {}, {}, 3),
        ("bradley-terry", {"cold_start_steps": 4}, {}, 7),
        ("bradley-terry", {"cold_start_steps": 4, "cold_start_prompts_per_step": 1}, {}, 3),
        ("head", {"cold_start_steps": 0.2}, {}, 7),
        ("head", {"cold_start_steps": 4, "cold_start_prompts_per_step": 1}, {}, 7),
        ("head", {"cold_start_steps": 4}, {"reference_step": 0}, 7),
        ("head", {}, {"reference_step": 6}, 9),
        ("reference-likelihood", {"cold_start_steps": 4}, {}, 4),
        ("reference-likelihood", {"cold_start_steps": 4}, {"reference_step": 6}, 6),
        ("polar", {"cold_start_steps": 4}, {"reference_step": 6}, 4),
    ],
)
def test_the_first_step_of_the_adversary_by_hand(
    kind: str, batching: dict[str, Any], objective: dict[str, Any], first: int
) -> None:
    """After the steps without rollouts or the reference that it reads, and a warm-up of what is trained."""
    values = {"batching": batching, "objective": objective, "max_steps": 20}
    settings = {"kind": kind, "warmup_steps": 3, "min_accuracy": 0.0}
    weights: list[float] = []
    for step in range(20):
        subject = at(step, discriminator=settings, **values)
        vars(subject)["adversary"] = with_accuracy(0.9, subject.config)
        weights.append(subject.lambda_adv)
    assert weights == [0.0] * first + [2.0] * (20 - first)


def test_without_demonstrations_there_is_no_cold_start() -> None:
    values: dict[str, Any] = {"method": "grpo", "max_steps": 10, "batching.cold_start_steps": 0.2}
    resolved = resolve(values)
    assert (resolved.config.cold_start_steps, resolved.config.reference_step) == (0, 0)
    assert resolved.notes == (
        "there is no cold start (batching.cold_start_steps 0.2): the method does not train on demonstrations",
    )


def test_demonstrations_are_drawn_only_where_they_have_a_weight() -> None:
    values: dict[str, Any] = {"max_steps": 10, "batching": {"cold_start_steps": 4}}
    values["objective"] = {"mu_peak": 1.0, "mu_valley": 0.0, "mu_decay_steps": 0}
    config = Config.model_validate(values)
    subject = Schedule(config=config, adversary=None, multiplier=Multiplier(value=1.0))
    found = []
    for subject.step in (0, 3, 4, 9):
        found.append(subject.imitates)
    assert found == [True, True, False, False]


def test_freezing_counts_the_steps_in_which_the_discriminator_can_learn() -> None:
    values: dict[str, Any] = {"batching": {"cold_start_steps": 4}, "objective": {"reference_step": 6}}
    for kind, first in (("bradley-terry", 4), ("head", 6)):
        config = Config.model_validate(values | {"discriminator": {"kind": kind, "freeze_after_steps": 3}})
        assert [step for step in range(12) if config.is_frozen(step)] == [*range(first + 3, 12)]
    assert not Config.model_validate(values).is_frozen(11)


def test_the_schedule_of_mu_begins_after_the_cold_start() -> None:
    values: dict[str, Any] = {"max_steps": 10, "batching": {"cold_start_steps": 2}}
    values["objective"] = {"mu_peak": 0.8, "mu_valley": 0.2, "mu_decay_steps": 2}
    config = Config.model_validate(values)
    subject = Schedule(config=config, adversary=None, multiplier=Multiplier(value=1.0))
    found = []
    for subject.step in range(6):
        found.append(subject.mu([]))
    assert found == pytest.approx([0.8, 0.8, 0.8, 0.5, 0.2, 0.2])
