"""What a stage's multiplier answers to, without a run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from uniapl import Config
from uniapl.functional import Multiplier
from uniapl.training.stage import Stage


def stage(controller: str, *, accuracy: float = 1.0, step: int = 10) -> Any:
    objective: dict[str, Any] = {"lambda_controller": controller, "max_expert_gap": 0.1}
    objective |= {"lambda_learning_rate": 1.0}
    values = {
        "objective": {**objective, "lambda_gains": (0.0, 1.0, 0.0)},
        "discriminator": {"warmup_steps": 5},
    }
    bare = object.__new__(Stage)
    bare.config = Config.model_validate(values)
    bare.step = step
    bare.multiplier = Multiplier(value=2.0)
    state = SimpleNamespace(accuracy=accuracy)
    vars(bare)["adversary"] = SimpleNamespace(learner=object(), state=state)
    return bare


@pytest.mark.parametrize("controller", ["dual", "pid"])
@pytest.mark.parametrize("win_rate", [0.1, 0.4, 0.45, 0.9])
def test_lambda_falls_as_fast_as_it_grows(controller: str, win_rate: float) -> None:
    """A win rate of 0.9 is as far beyond 0.5 as 0.1 is below it."""
    subject = stage(controller)
    said = subject.control(win_rate)
    violation = 0.5 - win_rate - 0.1
    expected = 2.0 * math.exp(violation) if controller == "dual" else 2.0 + violation
    assert subject.multiplier.value == pytest.approx(expected)
    assert said == pytest.approx(
        {
            "constraint/expert_gap": max(0.0, 0.5 - win_rate),
            "constraint/violation": violation,
            "constraint/multiplier": expected,
        }
    )


@pytest.mark.parametrize("unfelt", [{"accuracy": 0.5}, {"step": 4}], ids=["guessing", "warm-up"])
def test_lambda_waits_while_the_adversary_is_not_felt(unfelt: dict[str, Any]) -> None:
    subject = stage("dual", **unfelt)
    assert subject.control(0.1)["constraint/multiplier"] == 2.0
    assert subject.multiplier == Multiplier(value=2.0)


def test_without_pairs_or_with_a_fixed_lambda_nothing_is_said() -> None:
    assert stage("dual").control(None) == {}
    assert stage("fixed").control(0.1) == {}
