"""The rules that warn: what fires them, what does not, and that a run says so once."""

from pathlib import Path
from typing import Any

import pytest

from runs import lines, recipe, run_until, timeless, train
from tiny import save_model
from uniapl.train.health import warnings

WINDOW, BOUNDS = 5, (0.1, 8.0)
NOISE = (0.01, -0.01, 0.0, 0.02, -0.02)


def records(**pairs: tuple[float, float]) -> list[dict[str, Any]]:
    """Two windows; each metric has one mean in the first and another in the second, and some noise."""
    return [
        {name.replace("__", "/"): means[half] + noise for name, means in pairs.items()}
        for half in (0, 1)
        for noise in NOISE
    ]


def fired(given: list[dict[str, Any]]) -> set[str]:
    return set(warnings(given, window=WINDOW, bounds=BOUNDS))


WINS_MORE = {"discriminator__win_rate": (0.45, 0.6)}


def test_divergence() -> None:
    assert fired(records(**WINS_MORE, reward=(0.8, 0.6))) == {"divergence"}
    assert fired(records(**WINS_MORE, reward=(0.8, 0.8), sft__nll=(1.0, 1.3))) == {"divergence"}
    assert fired(records(**WINS_MORE, reward=(0.6, 0.8))) == set(), "better in both"
    assert fired(records(**WINS_MORE)) == set(), "nothing is known of what it is for"
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


def test_too_few_steps_and_unknown_values_say_nothing() -> None:
    bad = records(**WINS_MORE, reward=(0.8, 0.6))
    assert fired(bad[1:]) == set()
    assert fired([{}, *bad]) == {"divergence"}, "older ones are not looked at"
    for unknown in (None, float("nan")):
        assert fired([*bad[:5], *({**r, "reward": unknown} for r in bad[5:])]) == set()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_run_says_it_once_and_goes_on_saying_so_when_resumed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule looks at steps from before the interruption: the metrics are those of the whole run."""

    def three_of_four(history: list[dict[str, Any]], *, window: int, bounds: tuple[float, float]) -> Any:
        assert bounds == (0.05, 20.0)
        return {"rule": f"{len(history)} steps, remedy"} if len(history) >= 2 * window - 1 else {}

    monkeypatch.setattr("uniapl.train.health.warnings", three_of_four)
    values = {"max_steps": 6, "health": {"window": 2}}
    train(recipe(model_dir, tmp_path / "whole", **values))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == ["step 3: warning: 3 steps, remedy"]
    written = lines(tmp_path / "whole" / "metrics.jsonl")
    assert [record.get("health/rule") for record in written] == [None, None, 1, 1, 1, 1]
    run_until(4, recipe(model_dir, tmp_path / "broken", **values))
    train(recipe(model_dir, tmp_path / "broken", resume="auto", **values))
    assert timeless(lines(tmp_path / "broken" / "metrics.jsonl")) == timeless(written)
