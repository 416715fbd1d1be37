"""Tables and fronts from made-up outcomes, compared with values computed by hand; and their page."""

import json
import re
from typing import Any

import pytest

from uniapl.compare import plan, results
from uniapl.report.comparison import render_comparison

SPLITS = ("held_out", "held_out_combinations")


def outcome(good: float, nll: float, *, curve: list[float] | None = None) -> dict[str, Any]:
    final = dict.fromkeys(results.MEASURES, 0.5) | {"good": good, "expert_nll": nll}
    costs = [
        {"rollout_tokens": 100.0 * i, "trained_tokens": 50.0 * i, "seconds": 1.0 * i}
        for i in range(1, 1 + len(curve or [0.0]))
    ]
    points = [{"good": value, **cost} for value, cost in zip(curve or [good], costs, strict=True)]
    return {"final": {split: dict(final) for split in SPLITS}, "cost": costs[-1], "curve": points}


def made_up() -> dict[str, list[dict[str, Any]]]:
    return {
        "base": [outcome(0.2, 1.5), outcome(0.2, 1.5)],
        "sft": [outcome(0.4, 1.2), outcome(0.4, 1.2)],
        "grpo": [outcome(0.5, 1.8, curve=[0.3, 0.5]), outcome(0.7, 1.8, curve=[0.5, 0.7])],
        "uniapl": [outcome(0.6, 1.3, curve=[0.6, 0.6]), outcome(0.8, 1.3, curve=[0.8, 0.8])],
    }


def test_the_table_by_hand() -> None:
    table = results.table(made_up())
    assert table["best_baseline"] == "grpo"
    difference = table["methods"]["uniapl"]["minus_best_baseline"]["held_out"]
    assert difference == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1}), (
        "paired: the same on both seeds"
    )
    assert table["methods"]["uniapl"]["held_out"]["good"]["mean"] == pytest.approx(0.7)
    assert table["methods"]["grpo"]["cost"]["rollout_tokens"] == 200
    # grpo ends at 0.6: its curve (0.2, 0.4, 0.6) gets there at the end, uniapl (0.2, 0.7) at 4/5.
    assert table["levels"] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    reached = {m: list(table["methods"][m]["rollout_tokens_to_reach"].values()) for m in ("grpo", "uniapl")}
    assert reached["grpo"] == pytest.approx([50, 100, 150, 200])
    assert reached["uniapl"] == pytest.approx([20, 40, 60, 80])
    assert "rollout_tokens_to_reach" not in table["methods"]["base"]


def test_no_differences_without_a_baseline() -> None:
    table = results.table({name: made_up()[name] for name in ("base", "uniapl")})
    assert table["best_baseline"] is None
    assert table["levels"] == []
    assert results.short_table(table)[2][2] == ""


def swept(good: list[float], nll: list[float]) -> list[dict[str, Any]]:
    return [outcome(g, d) for g, d in zip(good, nll, strict=True)]


def test_fronts_by_hand() -> None:
    # uniapl's models are everywhere 0.1 better and 0.1 nats closer than grpo's.
    grpo = [swept([0.3, 0.4, 0.5, 0.6], [1.5, 1.6, 1.7, 1.8]) for _ in range(2)]
    ours = [swept([0.4, 0.5, 0.6, 0.7], [1.4, 1.5, 1.6, 1.7]) for _ in range(2)]
    base = [outcome(0.0, 1.4), outcome(0.0, 1.4)]
    fronts = results.fronts({"grpo": grpo, "uniapl": ours}, base)
    assert list(fronts) == [f"{s}/{d}" for s in SPLITS for d in ("expert_nll", "length_distance")]
    front = fronts["held_out/expert_nll"]
    assert (front["bounds"], front["levels"]) == ((1.4, 1.8), (0.0, 0.7))
    difference = front["methods"]["grpo"]["ours_minus_this"]
    assert difference["best_good"]["mean"] == pytest.approx(0.1)
    # By steps of 0.1 nats: ahead by 0.4 before the first model of grpo, by 0.2 then, by 0.1 at the end.
    assert difference["good_at_equal_closeness"]["mean"] == pytest.approx(
        (13 * 0.4 + 36 * 0.2 + 0.1) / 50, abs=0.02
    )
    assert difference["distance_at_equal_good"]["mean"] < -0.1
    assert front["methods"]["uniapl"]["ours_minus_this"] is None
    values = [point["value"] for point in front["methods"]["uniapl"]["points"]]
    assert values == list(plan.FRONTS["uniapl"][1])


def test_a_variant_is_compared_with_uniapl_on_the_same_seeds() -> None:
    ours = made_up()["uniapl"]
    variants = results.ablations({"none": ours, "worse": [outcome(0.5, 1.4), outcome(0.7, 1.4)]}, ours)
    assert variants["none"]["held_out"]["good"]["difference"]["mean"] == 0
    assert variants["worse"]["held_out"]["good"]["difference"]["mean"] == pytest.approx(-0.1)
    assert variants["worse"]["held_out"]["expert_nll"]["difference"]["low"] == pytest.approx(0.1)


def test_the_page_has_every_part() -> None:
    outcomes = made_up()
    grpo = [swept([0.3, 0.4, 0.5, 0.6], [1.5, 1.6, 1.7, 1.8]) for _ in range(2)]
    summary: dict[str, Any] = {
        "versions": {"uniapl": "0"},
        "seeds": [0, 1],
        "budget": {"rollouts": 9600, "demonstrations": 3200},
        "settings": {"uniapl": {"a<b": 1.0}},
        "search": {"uniapl": {"a<b": 2.0}},
        "table": results.table(outcomes),
        "curves": {m: results.mean_curve(outcomes[m], outcomes["base"]) for m in ("grpo", "uniapl")},
        "fronts": results.fronts({"grpo": grpo, "uniapl": grpo}, outcomes["base"]),
        "ablations": results.ablations({"worse": outcomes["grpo"]}, outcomes["uniapl"]),
    }
    text = render_comparison(summary, title="one")
    assert "a&lt;b = 1.0" in text
    assert "a&lt;b = 2.0" in text
    assert "+0.100 [+0.100, +0.100]" in text
    assert json.dumps(summary), "and so can be written as results.json"
    assert render_comparison(summary, title="one") == text, "the same results give the same bytes"
    visible = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|None)\b", visible)
