"""Candidates and a tokenizer for the tests of frozen discriminators."""

from transformers import PreTrainedTokenizerFast

from support.tiny import make_tokenizer
from uniapl.discriminator import Candidate
from uniapl.discriminator.polar import END, SEPARATOR
from uniapl.types import Example


def polar_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for POLAR's: one token per letter, a begin token before every text, POLAR's two tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [SEPARATOR, END]})
    return tokenizer


def candidate(text: str, *, prompt: str = "say a.", demonstration: str | None = "aaa") -> Candidate:
    encode = make_tokenizer().encode
    example = Example(
        row=1,
        prompt=prompt,
        prompt_ids=tuple(encode(prompt)),
        demonstration=demonstration,
        demonstration_ids=(*encode(demonstration), 1) if demonstration is not None else None,
        columns={},
    )
    return Candidate(example=example, completion_ids=(*encode(text), 1), text=text, reference=demonstration)


CANDIDATES = [candidate("aaa"), candidate("b"), candidate("cacbacab"), candidate("a", prompt="x, y and z.")]
