"""Types for values that files, torch and transformers leave partly untyped.

A type checker knows nothing about the items of `isinstance(value, dict)`, about the result of a tokenizer, or
about the items of `Tensor.tolist()`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

if TYPE_CHECKING:  # The configuration is read without torch.
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a mapping, such as a row or a message."""
    return isinstance(value, Mapping)


def is_dict(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dictionary, such as a JSON object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value is a list, such as a JSON array."""
    return isinstance(value, list)


def is_iterable(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether a value can be iterated over."""
    return isinstance(value, Iterable)


def is_sequence(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))


def items_of(tensor: "Tensor") -> list[Any]:
    """The numbers of a tensor as Python numbers, in nested lists if it has several dimensions."""
    return cast("Any", tensor).tolist()


def encode(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool = False
) -> tuple[int, ...]:
    """The token ids of a text, without the special tokens that the tokenizer can add around it."""
    return tuple(cast("Any", tokenizer(text, add_special_tokens=special_tokens)).input_ids)


def decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", **options: bool) -> str:
    """The text of token ids; the options are those of `tokenizer.decode`."""
    return str(cast("Any", tokenizer).decode(list(ids), **options))
