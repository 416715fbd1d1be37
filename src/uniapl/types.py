"""What flows through a step: examples, rollouts, their groups, and the micro-batches made of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

Prompt = str | list[dict[str, Any]]
"""A prompt as the data has it: plain text, or chat messages with `role` and `content`."""

TokenIds = tuple[int, ...]


def prompt_text(prompt: Prompt) -> str:
    """What is asked: the text, or the last message's.

    Example:
        >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
        'Why?'
    """
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named stream of random numbers.

    Every random draw of a run comes from a generator seeded so, never from a global state: what was drawn
    before, in which order and on which process cannot change it.

    Example:
        >>> derive_seed(0, "rollout", 3, 1) == derive_seed(0, "rollout", 3, 1)
        True
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of the data, tokenised.

    Example:
        Example(row=7, prompt="Name a colour.", prompt_ids=(5, 9, 2), demonstration="red",
                demonstration_ids=(31, 1), columns={"answer": "red"})
        where 1 is the end token. A row without an expert's answer has None twice.
    """

    row: int
    """The row's number in its source, counted from 1: what error messages name."""
    prompt: Prompt
    prompt_ids: TokenIds
    demonstration: str | None
    demonstration_ids: TokenIds | None
    """The expert's completion, its end token included."""
    rejected_ids: TokenIds | None = None
    """An answer that somebody liked less than the demonstration: the discriminator learns from it too."""
    columns: dict[str, Any]
    """Every other column of the row: what reward functions receive by name."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled answer, as the sampler gave it.

    Example:
        Rollout(completion_ids=(31, 1), sampling_logprobs=(-0.7, -0.1), finish_reason="stop",
                policy_version=12)
    """

    completion_ids: TokenIds
    """The sampled ids, the end token included when one was sampled: exactly what is trained on."""
    sampling_logprobs: tuple[float, ...]
    """Nats, one per id, at the sampling temperature, before top-k and top-p cut the distribution."""
    finish_reason: Literal["stop", "length"]
    policy_version: int
    """The step whose weights sampled it."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """All sampled answers of one prompt, with what is known of each.

    Example:
        RolloutGroup(example=..., rollouts=(a, b), texts=("red", "blue"), rewards=(1.0, None),
                     reward_parts={"exact": (1.0, None)}, policy_logits=(0.3, -0.2), expert_logit=0.9)
        where the second answer's reward is unknown: it is left out of the group's mean.
    """

    example: Example
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...] = ()
    """The decoded answers, for rewards and people; never encoded again."""
    rewards: tuple[float | None, ...] = ()
    """Weighted sum over the reward functions; None = not known."""
    reward_parts: dict[str, tuple[float | None, ...]]
    """Reward function -> its own value for each rollout."""
    policy_logits: tuple[float, ...] | None = None
    """The discriminator's logits of the rollouts; None without a discriminator."""
    expert_logit: float | None = None
    """Its logit of the prompt's demonstration; None where there is none."""


class Span(NamedTuple):
    """Where a row's tokens lie in its padded line, and whose prompt it has.

    Example:
        Span(start=0, prompt_length=2, length=4, prompt=7) of the padded row [5, 9, 31, 1, 0]
    """

    start: int
    prompt_length: int
    length: int
    """Of prompt and completion together."""
    prompt: int
    """Rows with the same number have the same prompt."""


def packed_tokens(spans: Sequence[Span]) -> int:
    """Tokens of the rows, each prompt counted once."""
    prompts = {span.prompt: span.prompt_length for span in spans}
    return sum(prompts.values()) + sum(span.length - span.prompt_length for span in spans)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Padded rows of both kinds, demonstrations and rollouts, with one mask per loss component.

    Everything is aligned to the token it speaks of: `sft_mask[b, t]` is True when token t of row b enters
    S_sft, and the log-probability that belongs to it is that of token t given the tokens before it.

    Example (one demonstration, one rollout with a known reward; 0 pads):
        input_ids  [[5, 9, 31, 1], [5, 9, 44, 0]]
        sft_mask   [[0, 0, 1, 1], [0, 0, 0, 0]]
        rl_mask    [[0, 0, 0, 0], [0, 0, 1, 0]]
        advantages [0.0, 0.5]
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    sft_mask: Bool[Tensor, "B T"]
    """Demonstration tokens."""
    rl_mask: Bool[Tensor, "B T"]
    """Rollout tokens whose reward is known."""
    adv_mask: Bool[Tensor, "B T"]
    """Rollout tokens that the discriminator judged."""
    rollout_mask: Bool[Tensor, "B T"]
    """All rollout tokens: what the KL term and the rollout metrics sum over."""
    advantages: Float[Tensor, " B"]
    adversarial_advantages: Float[Tensor, " B"]
    temperature: Float[Tensor, " B"]
    """The sampler's for rollouts, 1 for demonstrations."""
    sampling_logprobs: Float[Tensor, "B T"]
    """Nats, reported by the sampler; 0 outside `rollout_mask`."""
    spans: tuple[Span, ...] = ()
    """Of each row, so that the model can read them packed; empty: it reads them padded."""

    @property
    def tokens(self) -> int:
        """What the model reads: each prompt once and no padding, if packed."""
        if not self.spans:
            return self.input_ids.numel()
        return packed_tokens(self.spans)
