"""Which demonstrations are drawn, and which are negatives of which prompts."""

import pytest

from uniapl.discriminator.demonstrations import Demonstrations
from uniapl.types import Example, TokenIds


def example(row: int, prompt: tuple[int, ...], demonstration: tuple[int, ...] | None) -> Example:
    return Example(
        row=row,
        prompt="p",
        prompt_ids=prompt,
        demonstration="d",
        demonstration_ids=demonstration,
        columns={},
    )


def mismatched(subject: Demonstrations, example: Example, count: int, *names: int) -> list[TokenIds]:
    found = subject.mismatched(example, count, *names)
    assert {tokens.prompt for tokens in found} <= {example.prompt_ids}
    return [tokens.completion for tokens in found]


@pytest.mark.parametrize("count", [0, 1, 3, 5, 20])
def test_mismatched_demonstrations_are_different_ones_of_other_prompts(count: int) -> None:
    examples = [example(n, (n,), (100 + n, 1)) for n in range(30)]
    subject = Demonstrations([*examples, example(30, (30,), None)], seed=0)
    for one in [*examples, example(31, (31,), None)]:
        found = mismatched(subject, one, count, 7)
        assert len(found) == len(set(found)) == count
        assert set(found) <= {e.demonstration_ids for e in examples} - {one.demonstration_ids}
        assert found == mismatched(Demonstrations(examples, seed=0), one, count, 7), "draws are by seed"
    if count == 3:
        draws = [mismatched(subject, examples[0], count, *names) for names in ((7,), (8,), ())]
        draws += [mismatched(Demonstrations(examples, seed=1), examples[0], count, 7)]
        draws += [mismatched(subject, examples[1], count, 7)]
        assert len({tuple(draw) for draw in draws}) == 5


def test_a_demonstration_that_also_belongs_to_the_prompt_is_no_negative() -> None:
    """Prompt 5 has two demonstrations; prompts 6 and 8 have the same text as one of them."""
    one, two = example(0, (5,), (10, 1)), example(1, (5,), (11, 1))
    others = [example(2, (6,), (10, 1)), example(3, (7,), (12, 1)), example(4, (8,), (11, 1))]
    subject = Demonstrations([one, two, *others])
    assert mismatched(subject, one, 3) == mismatched(subject, two, 3) == [(12, 1)]
    assert sorted(mismatched(subject, others[0], 3)) == [(11, 1), (12, 1)]
    assert mismatched(Demonstrations([one, two]), one, 3) == []
    assert mismatched(Demonstrations(), one, 3) == []


def test_a_mismatched_demonstration_fits_in_the_context() -> None:
    long, short = example(0, (5, 5, 5), (10, 1)), example(1, (6,), (11, 11, 1))
    subject = Demonstrations([long, short], context_length=5)
    assert mismatched(subject, long, 1) == []
    assert mismatched(subject, short, 1) == [(10, 1)]
    assert mismatched(Demonstrations([long, short], context_length=6), long, 1) == [(11, 11, 1)]


def test_drawn_demonstrations_are_different_examples() -> None:
    examples = [example(n, (n,), (100 + n, 1)) for n in range(10)]
    subject = Demonstrations([*examples, example(10, (10,), None)], seed=0)
    drawn = [subject.draw(4, "demonstrations", step, 0) for step in range(40)]
    assert all(len({e.row for e in draw}) == 4 for draw in drawn)
    assert {e.row for draw in drawn for e in draw} == set(range(10))
    assert sorted(e.row for e in subject.draw(99, "demonstrations", 0, 0)) == list(range(10))
