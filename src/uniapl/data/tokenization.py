"""Token ids of prompts and demonstrations."""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.types import TokenIds


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Token ids of a plain text prompt, with the special tokens that the tokenizer adds at its start."""
    ids = tuple(tokenizer(text).input_ids)
    # Some tokenizers append EOS to every text, but a prompt that has ended cannot be continued.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode_completion(text: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> TokenIds:
    """Token ids up to and including the first stop token; the end token is appended if there is none.

    Text that a chat template writes after the stop token, often a newline, is removed: the sampler cannot
    generate it, so the discriminator would recognise demonstrations by it.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    eos_id: Any = tokenizer.eos_token_id
    return (*ids, eos_id) if end is None else ids[: end + 1]
