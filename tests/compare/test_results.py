"""Tables, fronts and the verdict from made-up outcomes, compared with values computed by hand; and their
page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from support.compared import MADE_UP, outcome, results_of, runs, summary
from uniapl.cli.compare import _show
from uniapl.compare import verdict
from uniapl.compare.plan import parse_methods
from uniapl.errors import UniAPLError
from uniapl.report.comparison import _curves, render_comparison


def test_the_table_by_hand() -> None:
    found = results_of(**MADE_UP)
    assert found["best"] == "grpo"
    ours = found["methods"]["uniapl"]
    assert ours["measures"]["score"]["mean"] == pytest.approx(0.61)
    assert ours["measures"]["expert_nll"]["mean"] == pytest.approx(1.3)
    # Lengths 10 and 12, compared with 10 and 10.
    assert ours["measures"]["length_distance"]["mean"] == pytest.approx(1.0)
    assert ours["measures"]["logprob_distance"]["mean"] == pytest.approx(0.5)
    # Differences 0.01, -0.02, -0.02 by seed: Student's t of 2 degrees of freedom, s = 0.01732.
    half = 4.302653 * 0.0173205 / 3**0.5
    expected = {"mean": -0.01, "low": -0.01 - half, "high": -0.01 + half}
    assert ours["minus_best"]["score"] == pytest.approx(expected, rel=1e-5)
    assert ours["minus_base"]["score"]["mean"] == pytest.approx(0.41)
    # The two prompts differ by 0.2: a standard deviation of 0.1414 over the root of 2.
    assert ours["prompt_error"] == pytest.approx(0.1)
    assert ours["cost"]["flops"] == 1e15
    assert (ours["steps"], ours["rollouts"]) == (10, 8 * 64)
    assert found["methods"]["base"]["steps"] == 0


def test_the_recommended_method_is_the_closest_of_the_best() -> None:
    found = results_of(**MADE_UP)
    assert verdict.equals(found["methods"], "grpo") == ["grpo", "uniapl"]
    assert found["recommended"]["method"] == "uniapl"
    text = " ".join(found["verdict"])
    assert "grpo has the highest reward on held_out: 0.620 [" in text
    assert "Not distinguishable from it with 3 seeds: uniapl (-0.010 [" in text
    assert "Measurably below it: sft (-0.200 [" in text
    assert "sft is closest to the expert: 1.200 nats per token" in text
    assert "Recommended: uniapl." in text
    assert "200 trained tokens, 1e+15 FLOPs and 10 s" in text


def test_a_cheaper_method_that_cannot_be_distinguished_is_named() -> None:
    values = MADE_UP | {"chord-mu": ([0.60, 0.63, 0.61], 1.3)}
    found = runs(**values)
    found["chord-mu"] = [
        outcome("chord-mu", seed, s, 1.31 + seed / 1000, flops=5e14)
        for seed, s in enumerate([0.6, 0.63, 0.61])
    ]
    variants = parse_methods("sft,grpo,uniapl,chord-mu")
    same = summary(found, variants)
    assert same["recommended"]["method"] == "uniapl"
    # 0.010 to 0.012 nats further is measurable, so that it is not an equal.
    assert not any("is cheaper" in sentence for sentence in same["verdict"])
    found["chord-mu"] = [
        outcome("chord-mu", seed, s, 1.31 + d, flops=5e14)
        for seed, (s, d) in enumerate([(0.6, 0.05), (0.63, 0.0), (0.61, -0.05)])
    ]
    same = summary(found, variants)
    assert any(
        sentence.startswith(
            "chord-mu cannot be distinguished from it in score and in closeness, and is cheaper"
        )
        for sentence in same["verdict"]
    )


def test_no_method_is_recommended_if_none_is_above_the_base() -> None:
    values = MADE_UP | {"base": ([0.2, 1.0, 0.6], 1.5)}
    found = results_of(**values)
    assert "recommended" not in found
    assert "No method's score is measurably above that of the model before training" in found["verdict"][-1]


def test_warnings_of_training() -> None:
    found = results_of(**MADE_UP)
    assert found["methods"]["grpo"]["warnings"] == {"entropy_low": [41, 42]}, "its first seed has none"
    assert found["methods"]["base"]["warnings"] == {}
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", render_comparison(found, title="one"))
    at = cells.index("entropy_low")
    assert cells[at : at + 3] == ["entropy_low", "2 of 3", "41, 42"]


def test_curves_begin_with_the_base() -> None:
    curve = results_of(**MADE_UP)["curves"]["grpo"]
    assert curve["rollout_tokens"] == [0, 50]
    assert curve["step"] == [0, 5]
    assert curve["score"] == pytest.approx([0.2, (0.62 + 0.2) / 2])
    assert curve["entropy"] == [None, pytest.approx(1.1)], "the base has no entropy"


def test_steps_without_rollouts_have_no_entropy() -> None:
    """In grpo -> sft, the first of the points has an entropy, and the page shows it at its rollout tokens."""
    found = runs(**{"base": ([0.2], 1.5), "grpo -> sft": ([0.6], 1.4)})
    (run,) = found["grpo -> sft"]
    last = {**run["curve"][0], "step": 10, "rollout_tokens": 80.0, "metrics": {}}
    found["grpo -> sft"] = [{**run, "curve": [*run["curve"], last]}]
    found = summary(found, parse_methods("grpo -> sft"))
    assert found["curves"]["grpo -> sft"]["entropy"] == [None, 1.0, None]
    (chart,) = [chart for chart in _curves(found["curves"]) if chart["title"].startswith("Entropy")]
    assert chart["lines"] == [{"label": "grpo -> sft", "x": [50.0], "y": [1.0]}]


def test_cells_of_earlier_versions_have_no_warnings() -> None:
    found = runs(**MADE_UP)
    old = {
        label: [{k: v for k, v in run.items() if k != "warnings"} for run in o] for label, o in found.items()
    }
    shown = summary(old, parse_methods("sft,grpo,uniapl"))
    assert all(method["warnings"] == {} for method in shown["methods"].values())


def test_fronts_by_hand() -> None:
    values = {
        "base": ([0.2, 0.2], 1.5),
        "grpo[objective.beta=0]": ([0.6, 0.6], 1.9),
        "grpo[objective.beta=0.5]": ([0.4, 0.4], 1.7),
        "uniapl[objective.beta=0]": ([0.7, 0.7], 1.7),
        "uniapl[objective.beta=0.5]": ([0.5, 0.5], 1.5),
    }
    found = {
        label: [outcome(label, s, x, nll) for s, x in enumerate(xs)] for label, (xs, nll) in values.items()
    }
    variants = parse_methods("grpo[objective.beta=0|0.5],uniapl[objective.beta=0|0.5]")
    fronts = summary(found, variants)["fronts"]
    assert list(fronts) == ["grpo, objective.beta", "uniapl, objective.beta"]
    theirs, ours = fronts.values()
    assert [point["value"] for point in ours["points"]] == [0, 0.5]
    # Bounds from 1.5 to 1.9 nats: halves with 0.2 and 0.4, the last with 0.6; and halves with 0.5 and 0.7.
    assert theirs["score_at_equal_closeness"]["mean"] == pytest.approx((25 * 0.2 + 24 * 0.4 + 0.6) / 50)
    assert ours["score_at_equal_closeness"]["mean"] == pytest.approx((25 * 0.5 + 25 * 0.7) / 50)
    assert ours["minus_best_front"] is None
    assert theirs["minus_best_front"]["mean"] == pytest.approx((25 * 0.2 + 24 * 0.4 + 0.6) / 50 - 0.6)


def test_a_measure_that_a_seed_lacks_is_left_out() -> None:
    found = runs(**MADE_UP)
    found["sft"][1]["final"]["held_out"]["texts"] = ["one", "word"]
    methods = summary(found, parse_methods("sft,grpo,uniapl"))["methods"]
    assert "distinct_2" not in methods["sft"]["measures"]
    assert methods["grpo"]["measures"]["distinct_2"]["mean"] == 1.0
    text = {**results_of(**MADE_UP), "methods": methods}
    assert "distinct-2" in render_comparison(text, title="one")


def test_an_unscored_suite_is_an_error() -> None:
    found = runs(base=([0.2, 0.2], 1.5), sft=([0.4, 0.4], 1.2))
    found["sft"][1]["final"]["held_out"]["scores"] = {"reward": [[0, 0], [0, 0]]}
    with pytest.raises(UniAPLError, match="suite 'held_out': no completion could be scored by 'reward'"):
        summary(found, parse_methods("sft"))


def test_the_short_table() -> None:
    header, *rows = verdict.short_table(results_of(**MADE_UP))
    assert header[:5] == ["method", "reward", "difference from grpo", "prompt s.e.", "expert nll"]
    assert [row[0] for row in rows] == ["base", "sft", "grpo", "uniapl"]
    assert rows[1][1:6] == ["0.420", "-0.200 [-0.250, -0.150]", "0.100", "1.200", "1.00"]
    assert rows[1][-2:] == ["1e+15", "10"]


def test_the_page_has_every_part() -> None:
    values: dict[str, Any] = MADE_UP | {
        "grpo[objective.beta=0]": ([0.6, 0.6, 0.6], 1.9),
        "grpo[objective.beta=0.5]": ([0.4, 0.4, 0.4], 1.7),
    }
    found = results_of(**MADE_UP)
    text = render_comparison(found, title="one")
    assert "a&lt;b = 2.0" in text
    assert "-0.200 [-0.250, -0.150]" in text
    visible = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|None)\b", visible)
    (marked,) = re.findall(r'<th scope="row">(\S+) <span class="pill good">', text)
    assert marked == "uniapl"
    for sentence in found["verdict"]:
        assert sentence.replace("'", "&#39;") in text
    assert json.dumps(found), "and so can be written as results.json"
    assert render_comparison(found, title="one") == text, "the same results give the same bytes"
    swept = {
        label: [outcome(label, s, x, nll) for s, x in enumerate(xs)] for label, (xs, nll) in values.items()
    }
    variants = parse_methods("sft,grpo,uniapl,grpo[objective.beta=0|0.5]")
    with_fronts = {**found, **summary(swept, variants)}
    assert "score at equal closeness" in render_comparison(with_fronts, title="one")


def test_a_label_with_settings_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console reads square brackets as markup."""
    label = "grpo[objective.beta=0]"
    monkeypatch.setattr(verdict, "short_table", lambda _: [["method", label], [label, "0.5"]])
    console = Console(record=True, width=200)
    _show({"seeds": [0, 1], "verdict": [], "search": {}}, Path("here"), console)
    assert console.export_text().count(label) == 2


def test_results_have_the_numbers_of_each_run_and_no_text() -> None:
    """Later statistics need each seed; the texts of data and models stay in the cells."""
    found = results_of(**MADE_UP)
    ours = found["runs"]["uniapl"]
    assert [run["seed"] for run in ours] == [0, 1, 2]
    assert [run["values"]["score"] for run in ours] == pytest.approx([0.61, 0.62, 0.6])
    assert [run["curve"][0]["values"]["score"] for run in ours] == pytest.approx([0.405, 0.41, 0.4])
    assert ours[1]["curve"][0]["entropy"] == 1.1
    assert ours[0]["scores"]["held_out"]["reward"]["prompt_error"] == pytest.approx(0.1)
    assert "a b" not in json.dumps(found["runs"])
