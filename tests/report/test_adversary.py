"""What the adversary did, counted by hand, in the sentence of console and model card and in the report."""

from pathlib import Path
from typing import Any

import pytest

from support.report_runs import metric_rows, write_run
from uniapl.report.adversary import AdversaryEffect
from uniapl.report.charts import curves
from uniapl.report.reading import read_run
from uniapl.report.summary import tiles

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
    (tile,) = [tile for tile in tiles(run) if tile["label"] == "Steps in which the adversary acted"]
    assert tile["value"] == "4 of 4"
    assert tile["detail"] == (
        "of those with rollouts; it changed rewards by 0.25 and advantages by 0.25 on average"
    )
    titles = [chart["title"] for theme in curves([run]) for chart in theme["charts"]]
    assert {"Change by the adversary", "Steps in which the adversary acted"} <= {*titles}
    without = read_run(write_run(tmp_path / "grpo", metric_rows(4)))
    assert "Steps in which the adversary acted" not in [tile["label"] for tile in tiles(without)]
    titles = [chart["title"] for theme in curves([without]) for chart in theme["charts"]]
    assert not [title for title in titles if "adversary" in title]
