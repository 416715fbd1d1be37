"""Token ids of prompts and completions."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.data.rendering import Results
from uniapl.errors import UsageError
from uniapl.types import TokenIds
from uniapl.untyped import decode, encode

CONTEXTS = ("\n", ".", "a")
"""Texts to put before a completion in place of a prompt whose last token would merge with it."""


class EndsEarlyError(UsageError):
    """The text of a completion continues after its first end token, where training would cut it."""


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Token ids of a plain text prompt, with the special tokens that the tokenizer adds at its start."""
    ids = encode(text, tokenizer, special_tokens=True)
    # Some tokenizers append EOS to every text, but a prompt that has ended cannot be continued.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> TokenIds:
    """Token ids of a text that continues a prompt: those of prompt and text together, after the prompt's.

    If a token spans the boundary, the text is tokenised after another one. Alone, it would begin with the
    word mark that SentencePiece and Metaspace tokenizers put before a text, which reads as a space.
    """

    for before in (prompt, *CONTEXTS):
        start, whole = encode(before, tokenizer), encode(before + text, tokenizer)
        if before and whole[: len(start)] == start:
            return whole[len(start) :]
    return encode(text, tokenizer)


def encode_completion(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    *,
    prompt: str = "",
    answer: str | None = None,
    name: str = "demonstration",
) -> TokenIds:
    """Token ids up to and including the first stop token; the end token is appended if there is none.

    Text that a chat template writes after the stop token, often a newline, is removed: the sampler cannot
    generate it, so the discriminator would recognise demonstrations by it.

    Args:
        text: The completion, with what the chat template writes around it.
        prompt: The text before it, as it was tokenised.
        answer: The completion as in the data, which must not be cut.
        name: The name of the completion in the error message.

    Raises:
        EndsEarlyError: The answer continues after the first stop token.
    """
    ids = encode_continuation(text, tokenizer, prompt)
    end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    eos_id: Any = tokenizer.eos_token_id
    if end is None:
        return (*ids, eos_id)
    if _continues(text, ids[end + 1 :], answer, tokenizer):
        token = decode([ids[end]], tokenizer)
        ordinary = ", which is not a special token" if ordinary_tokens([ids[end]], tokenizer) else ""
        raise EndsEarlyError(f"{name} continues after the end token '{token}'{ordinary}")
    return ids[: end + 1]


def encode_results(
    results: Results, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], *, ended: bool = True
) -> TokenIds:
    """Token ids between a turn that calls tools and the next one: what follows the stop token of the turn.

    They begin with that stop token if the template writes it as a part of the results, as GLM's does.

    Args:
        ended: Whether the turn has its stop token. A turn that a stop string ended has none: the token ids
            begin with it.

    Raises:
        UsageError: The results merge with the turn into other tokens.
    """
    closed, answered = (encode(text, tokenizer) for text in results)
    if answered[: len(closed)] != closed:
        raise UsageError("the tokenizer joins a tool call and the tool's result into one token")
    # The turn's own stop token; without one, the sampler's turn has an end token that the template lacks.
    last = next((n for n in range(len(closed) - 1, -1, -1) if closed[n] in stop_ids), None)
    trailing = decode(closed[last + 1 :], tokenizer) if last is not None else "?"
    if last is None or trailing.strip():
        return answered[len(closed) :]
    return answered[last + ended :]


def without_end(ids: TokenIds, stop_ids: Collection[int]) -> TokenIds:
    """The completion without the stop token that closes it; a truncated completion has none."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def text_length(
    ids: TokenIds,
    stop_ids: Collection[int],
    stop_strings: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Number of tokens before what closes the completion, a stop token or the tokens of a stop string."""
    ids = without_end(ids, stop_ids)
    text = _decoded(ids, tokenizer)
    closing = next((string for string in stop_strings if text.endswith(string)), "")
    count = len(ids)
    while closing and len(_decoded(ids[:count], tokenizer)) > len(text) - len(closing):
        count -= 1
    return count


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return decode(ids, tokenizer, clean_up_tokenization_spaces=False)


def ordinary_tokens(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand for ordinary text: tokens that are neither special nor added to the vocabulary."""
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(token for token in ids if token < len(tokenizer) and token not in marks)


def _continues(text: str, rest: TokenIds, answer: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens after the first stop token hold more than what the chat template writes there."""
    answer = (answer or "").strip()
    if answer and answer in text:
        template_text = "".join(text.rpartition(answer)[2].split())
        return not template_text.endswith("".join(decode(rest, tokenizer).split()))
    # The template has changed the answer: only its special tokens can be recognised.
    return bool(decode(rest, tokenizer, skip_special_tokens=True).strip())
