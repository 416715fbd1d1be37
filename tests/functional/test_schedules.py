"""The weight schedule against CHORD's formula."""

import math

import pytest

from uniapl.functional import reward_threshold, warmup_cosine


def test_by_hand() -> None:
    got = [warmup_cosine(s, warmup_steps=2, decay_steps=4, peak=0.8, valley=0.2) for s in range(8)]
    half = 0.2 + 0.6 * 0.5 * (1 + math.cos(math.pi / 4))
    other = 0.2 + 0.6 * 0.5 * (1 + math.cos(3 * math.pi / 4))
    assert got == pytest.approx([0.0, 0.4, 0.8, half, 0.5, other, 0.2, 0.2])


def test_a_constant_is_a_schedule() -> None:
    for step in (0, 1, 1000):
        assert warmup_cosine(step, warmup_steps=0, decay_steps=0, peak=0.3, valley=0.3) == 0.3


def test_without_decay_the_valley_follows_the_warm_up() -> None:
    got = [warmup_cosine(s, warmup_steps=2, decay_steps=0, peak=0.8, valley=0.1) for s in range(4)]
    assert got == pytest.approx([0.0, 0.4, 0.1, 0.1])


def test_reward_threshold_by_hand() -> None:
    mus = [reward_threshold(r, threshold=0.5, peak=0.4, valley=0.05) for r in (0.0, 0.2, 0.48, 0.9)]
    assert mus == pytest.approx([0.4, 0.3, 0.05, 0.05])
