"""What the adversary did, counted by hand, in the sentence of console and model card and in the report."""

from pathlib import Path
from typing import Any

import pytest

from support.report_runs import metric_rows, write_run
from uniapl.report.adversary import AdversaryEffect
from uniapl.report.charts import curves
from uniapl.report.reading import read_run
from uniapl.report.summary import results
from uniapl.report.verdict import adversary

ROLLOUTS = {"completions/mean_length": 3.0}


def multiplied(reward: float, advantage: float) -> dict[str, Any]:
    changes = {"adversary/reward_change": reward, "adversary/advantage_change": advantage}
    return {"adversary/active": 1, **ROLLOUTS, **changes}


RECORDS = [
    {"reward": 0.5, **ROLLOUTS},
    {"adversary/active": 0},
    {"adversary/active": 0, **ROLLOUTS},
    multiplied(0.5, 0.25),
    multiplied(0.25, 0.0),
    {"adversary/active": 1, **ROLLOUTS},  # It multiplied no reward.
    multiplied(0.0, 0.5),
]


def test_the_sentence_by_hand() -> None:
    """A step of a stage without an adversary, one of the cold start, one of the warm-up, four active ones."""
    assert AdversaryEffect.of(RECORDS) == AdversaryEffect(
        steps=6, rollout_steps=5, active_steps=4, changed_steps=3, reward_change=0.75, advantage_change=0.75
    )
    assert AdversaryEffect.of(RECORDS).sentence == (
        "the adversary acted in 4 of 5 steps with rollouts; "
        "it changed rewards by 0.25 and advantages by 0.25 on average"
    )


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], None),
        (RECORDS[:1], None),
        (RECORDS[1:2], "the adversary did not act, because no step had rollouts"),
        (RECORDS[1:3], "the adversary acted in 0 of 1 steps with rollouts"),
        ([{"adversary/active": 1, **ROLLOUTS}] * 2, "the adversary acted in 2 of 2 steps with rollouts"),
    ],
    ids=["no steps", "no adversary", "no rollouts", "warm-up only", "its own loss"],
)
def test_what_is_unknown_is_not_in_the_sentence(records: list[dict[str, Any]], sentence: str | None) -> None:
    assert AdversaryEffect.of(records).sentence == sentence


def test_the_report_shows_it(tmp_path: Path) -> None:
    rows = [row | added for row, added in zip(metric_rows(4), RECORDS[3:], strict=True)]
    run = read_run(write_run(tmp_path / "run", rows))
    assert {"label": "Steps in which the adversary acted", "value": "4 of 4"} in results(run)
    assert adversary(run) == [
        {
            "kind": "good",
            "label": "Adversary",
            "texts": [
                "The adversary acted in 4 of 4 steps with rollouts; it changed rewards by 0.25 and "
                "advantages by 0.25 on average."
            ],
        }
    ]
    titles = [chart["title"] for theme in curves([run]) for chart in theme["charts"]]
    assert {"Change by the adversary", "Steps in which the adversary acted"} <= {*titles}
    without = read_run(write_run(tmp_path / "grpo", metric_rows(4)))
    assert "Steps in which the adversary acted" not in [result["label"] for result in results(without)]
    assert adversary(without) == []
    titles = [chart["title"] for theme in curves([without]) for chart in theme["charts"]]
    assert not [title for title in titles if "adversary" in title]


@pytest.mark.parametrize(
    ("active", "rollouts", "kind"),
    [([1, 1, 0, 0], 4, "good"), ([1, 0, 0, 0], 4, "warn"), ([0] * 4, 4, "bad"), ([0] * 4, 0, "open")],
)
def test_the_verdict_without_multiplication(
    tmp_path: Path, active: list[int], rollouts: int, kind: str
) -> None:
    """The mean lambda is that of the steps in which it acted: 0.5, or 0.5 and 1."""
    rows = [
        {"step": step, "adversary/active": acts, "weight/lambda_adv": step / 2}
        | (ROLLOUTS if step <= rollouts else {})
        for step, acts in enumerate(active, start=1)
    ]
    (item,) = adversary(read_run(write_run(tmp_path / "run", rows)))
    weight = {2: "0.75", 1: "0.50"}.get(sum(active))
    expected = [f"Its weight lambda was {weight} on average in these steps."] if weight else []
    assert (item["kind"], item["texts"][1:]) == (kind, expected)
