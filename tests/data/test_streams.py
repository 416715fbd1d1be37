"""The streams' positions and epochs, and the fraction of prompts that is held out."""

import pytest

from uniapl.config import Config
from uniapl.data.streams import Stream, is_held_out
from uniapl.types import Example, derive_seed


def example(*prompt: int) -> Example:
    return Example(
        row=prompt[0], prompt="p", prompt_ids=prompt, demonstration=None, demonstration_ids=None, columns={}
    )


def test_peek_shows_what_take_gives_and_moves_nothing() -> None:
    stream = Stream([example(n) for n in range(5)], seed=1, name="prompts")
    shown = stream.peek(7)
    assert stream.position == 0
    assert stream.take(7) == shown
    assert (stream.position, len(stream), stream.epoch) == (7, 5, 7 / 5)
    assert stream.peek(2) == stream.take(2)
    first, second = shown[:5], shown[5:] + stream.peek(1)
    assert sorted(e.row for e in first) == [0, 1, 2, 3, 4]
    assert len({e.row for e in second}) == 3


def test_the_order_depends_on_seed_name_and_epoch() -> None:
    examples = [example(n) for n in range(30)]

    def order(seed: int, name: str) -> list[int]:
        return [e.row for e in Stream(examples, seed=seed, name=name).take(60)]

    one = order(1, "prompts")
    assert one == order(1, "prompts")
    assert one[:30] != one[30:]
    assert one[:30] != order(2, "prompts")[:30]
    assert one[:30] != order(1, "demonstrations")[:30]


def test_an_empty_stream_gives_nothing() -> None:
    stream = Stream([], seed=1, name="prompts")
    assert (stream.take(3), stream.peek(3), stream.position, stream.epoch) == ([], [], 0, 0.0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_the_held_out_fraction_is_drawn_by_the_prompt_s_ids(fraction: float) -> None:
    config = Config.model_validate({"discriminator": {"held_out_fraction": fraction}})
    drawn = [is_held_out(example(n, 7), config) for n in range(2000)]
    assert sum(drawn) / len(drawn) == pytest.approx(fraction, abs=0.03)
    larger = Config.model_validate({"discriminator": {"held_out_fraction": min(0.95, fraction + 0.05)}})
    assert all(is_held_out(example(n, 7), larger) for n in range(2000) if drawn[n])
    # A run that continues with another seed trains on none of them.
    other = Config.model_validate({"seed": 1, "discriminator": {"held_out_fraction": fraction}})
    assert [is_held_out(example(n, 7), other) for n in range(2000)] == drawn


def test_examples_are_skipped_by_their_probability() -> None:
    """A slow reference; the draw depends only on the position, so that a resumed stream goes on alike."""
    examples = [example(n) for n in range(7)]
    probability = {n: (0.3 if n % 2 else 1.0) for n in range(7)}
    turns = [e.row for e in Stream(examples, seed=3, name="prompts").take(70)]
    drawn = [
        (position, row)
        for position, row in enumerate(turns)
        if derive_seed(3, "prompts", "turn", position) / 2**63 < probability[row]
    ]
    stream = Stream(examples, seed=3, name="prompts")
    stream.probability = lambda e: probability[e.row]
    for count in (1, 4, 0, 9, 20):
        (taken, drawn), before = (drawn[:count], drawn[count:]), stream.position
        assert [e.row for e in stream.peek(count)] == [row for _, row in taken]
        assert stream.position == before
        assert [e.row for e in stream.take(count)] == [row for _, row in taken]
        assert stream.position == (taken[-1][0] + 1 if taken else before)
        again = Stream(examples, seed=3, name="prompts", position=stream.position)
        again.probability = stream.probability
        assert again.peek(5) == stream.peek(5)
    # Of 70 turns of each kind, 0.3 of the odd ones.
    stream = Stream(examples, seed=3, name="prompts")
    stream.probability = lambda e: probability[e.row]
    taken_rows = [e.row for e in stream.take(2000)]
    odd, even = (sum(row % 2 == kind for row in taken_rows) for kind in (1, 0))
    assert odd / 3 / (even / 4) == pytest.approx(0.3, abs=0.04)
