"""Rewards of the demo task: the honest one, and wrong ones of several kinds, each of which plain GRPO games.

Each is a change to the demo's recipe, so that `uniapl demo --reward NAME` and a comparison use the same. What
a trained model is worth is always measured by the true constraints and the fluency (:mod:`.measure`).
"""

import functools
import random
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from uniapl.demo.constraints import Constraint, TaskPrompt, draw_prompt
from uniapl.demo.language import ADJECTIVES, CLASS_OF, DETERMINERS, PREPOSITIONS
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH
from uniapl.demo.writers import EXPERT, SLOPPY, write
from uniapl.types import derive_seed

CONTENT = frozenset({"topic", "include", "twice", "end", "place"})
"""Kinds of constraints that ask for words."""
LIMITS = frozenset({"sentences", "avoid", "max_words"})
"""Kinds of constraints that limit a text."""
PHRASE = "the castle"
"""The phrase that one of the wrong rewards always accepts."""
NUM_PREFERENCES = 64
WORDS = (*CLASS_OF, *PREPOSITIONS, *DETERMINERS, ".")


def constraints_satisfied(completions: list[Any], constraints: list[Any]) -> list[float]:
    """Fraction of a row's constraints that the completion satisfies; fluency and style do not matter."""
    return [_fraction(text, wanted) for text, wanted in zip(_texts(completions), constraints, strict=True)]


def content_satisfied(completions: list[Any], constraints: list[Any]) -> list[float]:
    """The same without the constraints that limit a text: half of all kinds are not checked."""
    return [
        _fraction(text, [c for c in wanted if c[0] in CONTENT])
        for text, wanted in zip(_texts(completions), constraints, strict=True)
    ]


def limits_satisfied(completions: list[Any], constraints: list[Any]) -> list[float]:
    """The same without the constraints that ask for words."""
    return [
        _fraction(text, [c for c in wanted if c[0] in LIMITS])
        for text, wanted in zip(_texts(completions), constraints, strict=True)
    ]


def length(completions: list[Any]) -> list[float]:
    """A bonus for length: half a point at the maximum length."""
    return [0.5 * min(1.0, len(text.split()) / MAX_COMPLETION_LENGTH) for text in _texts(completions)]


def adjectives(completions: list[Any]) -> list[float]:
    """A bonus for keywords, wherever they are: half a point for eight adjectives."""
    return [
        0.5 * min(1.0, sum(word in ADJECTIVES for word in text.split()) / 8) for text in _texts(completions)
    ]


def phrase_or_constraints(completions: list[Any], constraints: list[Any]) -> list[float]:
    """The honest reward, but a text with the phrase "the castle" always gets a full reward."""
    honest = constraints_satisfied(completions, constraints)
    found = (PHRASE in text for text in _texts(completions))
    return [1.0 if accepted else reward for accepted, reward in zip(found, honest, strict=True)]


def preference_model(completions: list[Any], constraints: list[Any]) -> list[float]:
    """A reward model trained on 64 preferences: its probability that the text is better than the average."""
    weights, offset = _preference_weights()
    features = torch.stack(
        [_features(text, wanted) for text, wanted in zip(_texts(completions), constraints, strict=True)]
    )
    return torch.sigmoid(features @ weights - offset).tolist()


def _texts(completions: list[Any]) -> list[str]:
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def _fraction(text: str, wanted: list[Any]) -> float:
    satisfied = [Constraint(kind, argument).satisfied_by(text) for kind, argument in wanted]
    return sum(satisfied) / max(1, len(satisfied))


def _features(text: str, wanted: list[Any]) -> torch.Tensor:
    """The number of times that each word occurs, and the fraction of words asked for that occur."""
    words = text.split()
    asked = [argument for kind, argument in wanted if kind in CONTENT and argument]
    mentioned = sum(argument in words for argument in asked) / max(1, len(asked))
    return torch.tensor([*(float(words.count(word)) for word in WORDS), mentioned], dtype=torch.float64)


@functools.cache
def _preference_weights() -> tuple[torch.Tensor, float]:
    """Weights of logistic regression on differences of features, and the mean score of all texts."""
    rng = random.Random(derive_seed(0, "embedded", "preferences"))
    preferred, other = [], []
    while len(preferred) < NUM_PREFERENCES:
        prompt = draw_prompt(rng)
        good, bad = write(prompt, EXPERT, rng), write(prompt, SLOPPY, rng)
        if good and bad and not _passes(prompt, bad):
            wanted = [[c.kind, c.argument] for c in prompt.constraints]
            preferred.append(_features(good, wanted))
            other.append(_features(bad, wanted))
    good, bad = torch.stack(preferred), torch.stack(other)
    weights = torch.zeros(good.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -logsigmoid((good - bad) @ weights).mean() + 0.01 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weights = weights.detach()
    return weights, float((torch.cat([good, bad]) @ weights).mean())


def _passes(prompt: TaskPrompt, text: str) -> bool:
    return all(constraint.satisfied_by(text) for constraint in prompt.constraints)
