"""The wrong rewards of the demo task: what each accepts although it is not what the prompt asks for."""

import random

import pytest

from uniapl.cli.demo import demo
from uniapl.config.resolve import resolve
from uniapl.demo.constraints import Constraint, TaskPrompt, draw_prompt
from uniapl.demo.recipe import RECIPE, REWARDS
from uniapl.demo.rewards import (
    adjectives,
    constraints_satisfied,
    content_satisfied,
    length,
    limits_satisfied,
    phrase_or_constraints,
    preference_model,
)
from uniapl.demo.task import as_row
from uniapl.demo.writers import EXPERT, SLOPPY, write
from uniapl.errors import UsageError

PROMPT = TaskPrompt(
    sentences=1, topic="king", extras=(Constraint("include", "cup"), Constraint("avoid", "adverb"))
)
CONSTRAINTS = as_row(PROMPT)["constraints"]


@pytest.mark.parametrize(
    ("text", "honest", "content", "limits"),
    [
        ("the king lost a cup .", 1.0, 1.0, 1.0),
        # Not a sentence, and an adverb: half of the constraints are not checked.
        ("king cup softly", 0.5, 1.0, 0.0),
        ("the queen lost a ring .", 0.5, 0.0, 1.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_a_verifier_may_miss_half_of_the_constraints(
    text: str, honest: float, content: float, limits: float
) -> None:
    for function, expected in (
        (constraints_satisfied, honest),
        (content_satisfied, content),
        (limits_satisfied, limits),
    ):
        assert function([text], [CONSTRAINTS]) == [expected]


def test_bonuses_by_hand() -> None:
    assert length(["a b c", "a " * 24, "a " * 96]) == [0.5 * 3 / 48, 0.25, 0.5]
    assert adjectives(["the old dark king", "old " * 20, "the king"]) == [0.125, 0.5, 0.0]


def test_a_phrase_is_worth_a_full_reward() -> None:
    texts = ["the castle", "castle", "the king lost a cup ."]
    assert phrase_or_constraints(texts, [CONSTRAINTS] * 3) == [1.0, 0.25, 1.0]


def test_the_preference_model_prefers_the_expert_and_likes_length() -> None:
    """On prompts of its own distribution it is right more often than not, and its score is not bounded by
    what is asked for: repeated words that it likes raise it."""
    rng, right = random.Random(1), []
    while len(right) < 200:
        prompt = draw_prompt(rng)
        texts = [write(prompt, style, rng) for style in (EXPERT, SLOPPY)]
        if None in texts or all(c.satisfied_by(str(texts[1])) for c in prompt.constraints):
            continue
        better, worse = preference_model(texts, [as_row(prompt)["constraints"]] * 2)
        right.append(better > worse)
    assert 0.6 < sum(right) / len(right) < 0.95
    once, often = preference_model(["the king", "the king the king"], [CONSTRAINTS] * 2)
    assert 0 < once < often < 1


def test_every_reward_is_a_change_of_the_recipe_and_unknown_ones_are_named() -> None:
    for changes in REWARDS.values():
        config = resolve({**RECIPE, **changes}).config
        assert config.rewards.functions
    assert resolve({**RECIPE, **REWARDS["preferences"]}).config.objective.pass_threshold == 0.5
    with pytest.raises(UsageError, match="unknown reward 'none': choose one of honest, gameable"):
        demo(["--reward", "none"])
    with pytest.raises(UsageError, match="unknown reward ''"):
        demo(["--reward"])
