"""The one-page example keeps its promises: it learns, is short, and needs nothing but the mathematics."""

import ast
import importlib.util
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learns_from_all_three_components(example: ModuleType) -> None:
    history = example.main(steps=100)
    quarter = len(history) // 4

    def first_and_last(name: str) -> tuple[float, float]:
        return mean(h[name] for h in history[:quarter]), mean(h[name] for h in history[-quarter:])

    reward, later_reward = first_and_last("reward")
    assert later_reward > reward + 0.15
    nll, later_nll = first_and_last("nll")
    assert later_nll < 0.6 * nll
    # The reward also pays for babble: what it was meant for, and what only the expert shows, must rise too.
    right, later_right = first_and_last("right")
    assert later_right > right + 0.3
    manner, later_manner = first_and_last("manner")
    assert later_manner > manner + 0.4
    # The discriminator knows nothing at first, then tells policy from expert, until the policy catches up.
    assert history[0]["win_rate"] == 0.5
    assert min(h["win_rate"] for h in history) < 0.45
    assert first_and_last("win_rate")[1] > 0.4


def test_is_determined_by_its_seed(example: ModuleType) -> None:
    assert example.main(steps=3) == example.main(steps=3)
    assert example.main(steps=3) != example.main(steps=3, seed=1)


def test_masks_and_logprobs_speak_of_the_token_at_their_position(example: ModuleType) -> None:
    rows = ["abcd>", "hgfe>"], [example.encode("DCBA."), example.encode("_.")]
    input_ids, attention_mask, completion_mask = example.pad(*rows)
    assert attention_mask.sum(-1).tolist() == [10, 7]
    selected = [ids[keep].tolist() for ids, keep in zip(input_ids, completion_mask, strict=True)]
    assert [example.decode(ids) for ids in selected] == ["DCBA.", "_."]

    def counts_upwards(input_ids: Tensor, **_: object) -> SimpleNamespace:
        """A policy that is certain that the next id is one more than this one."""
        return SimpleNamespace(logits=100.0 * one_hot(input_ids + 1, len(example.VOCABULARY)))

    ids = torch.tensor([[3, 4, 9, 10]])
    logprobs = example.token_logprobs(counts_upwards, ids, torch.ones_like(ids))
    assert logprobs[0].tolist() == pytest.approx([0.0, 0.0, -100.0, 0.0])


def test_imports_only_the_mathematics() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    foreign = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"torch", "transformers", "uniapl.functional"}


def test_fits_on_one_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 250
