"""Comparisons for the tests of discriminators."""

from uniapl.discriminator.bradley_terry import (
    Comparison,
)

COMPARISONS = [
    Comparison(prompt_ids=(5, 6), demonstration_ids=(7, 8, 1), completions=((9, 9), (10, 11, 12, 13))),
    Comparison(prompt_ids=(14,), demonstration_ids=(7, 1), completions=((9, 15, 9, 16, 17),)),
    Comparison(prompt_ids=(5, 6, 7, 8, 9), demonstration_ids=(7, 1), completions=((10,), (11,), (12,))),
]


def sequences() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [sequence for comparison in COMPARISONS for sequence in comparison.sequences]
