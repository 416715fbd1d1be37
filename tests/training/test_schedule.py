"""How a learned lambda_adv follows the win rate, without a run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from uniapl import Config
from uniapl.functional import Multiplier
from uniapl.training.schedule import Schedule


def schedule(controller: str, *, accuracy: float = 1.0, step: int = 10) -> Schedule:
    objective: dict[str, Any] = {"lambda_controller": controller, "max_expert_gap": 0.1}
    objective |= {"lambda_learning_rate": 1.0}
    values = {
        "objective": {**objective, "lambda_gains": (0.0, 1.0, 0.0)},
        "discriminator": {"warmup_steps": 5},
    }
    config, multiplier = Config.model_validate(values), Multiplier(value=2.0)
    subject = Schedule(config=config, adversary=None, multiplier=multiplier, step=step)
    state = SimpleNamespace(accuracy=accuracy)
    vars(subject)["adversary"] = SimpleNamespace(trainer=object(), state=state)
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
