"""Typed access to values that files, torch and transformers leave untyped."""

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
import torch

from support.tiny import make_tokenizer
from uniapl.untyped import decode, encode, is_dict, is_iterable, is_list, is_mapping, is_sequence, items_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, (True, True, False, False)),
        (OrderedDict(a=1), (True, True, False, False)),
        (MappingProxyType({}), (True, False, False, False)),
        ([], (False, False, True, True)),
        ((1,), (False, False, False, True)),
        ("text", (False, False, False, False)),
        (None, (False, False, False, False)),
        ({1}, (False, False, False, False)),
    ],
)
def test_kinds_of_values(value: Any, expected: tuple[bool, ...]) -> None:
    assert (is_mapping(value), is_dict(value), is_list(value), is_sequence(value)) == expected


def test_items_are_python_numbers() -> None:
    assert items_of(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    (half,) = items_of(torch.tensor([0.5]))
    assert type(half) is float
    assert half == 0.5


def test_texts_and_their_token_ids() -> None:
    tokenizer = make_tokenizer()
    ids = encode("ba", tokenizer)
    assert [tokenizer.convert_ids_to_tokens(token) for token in ids] == ["b", "a"]
    assert decode((*ids, 1), tokenizer) == "ba<eos>"
    assert decode((*ids, 1), tokenizer, skip_special_tokens=True) == "ba"


def test_special_tokens_of_the_tokenizer_only_on_request() -> None:
    from support.templates import byte_tokenizer

    tokenizer = byte_tokenizer(None, bos=True)
    assert encode("", tokenizer, special_tokens=True) == (2,)
    assert encode("", tokenizer) == ()


def test_a_generator_is_iterable_and_a_number_is_not() -> None:
    assert is_iterable(number for number in ())
    assert not is_iterable(1)
