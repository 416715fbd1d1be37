"""The data types of a step: examples, rollouts, rollout groups and micro-batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

Prompt = str | list[dict[str, Any]]
"""A prompt as in the data: plain text, or chat messages with `role` and `content`."""

TokenIds = tuple[int, ...]

Given = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of a completion's tokens that its author did not write: results of tools, with what
the chat template puts around them. They are context; no loss component has them."""


class Tokens(NamedTuple):
    """A prompt and a completion of it."""

    prompt: TokenIds
    completion: TokenIds
    given: Given = ()

    @property
    def pair(self) -> tuple[TokenIds, TokenIds]:
        """Prompt and completion."""
        return self.prompt, self.completion

    @property
    def num_written(self) -> int:
        """Number of completion tokens that the policy or the expert wrote."""
        return len(self.completion) - sum(stop - start for start, stop in self.given)

    @property
    def is_written(self) -> list[bool]:
        """For each token of the completion, whether the policy or the expert wrote it.

        Example:
            >>> Tokens((5,), (7, 1, 8, 9, 1), given=((2, 4),)).is_written
            [True, True, False, False, True]
        """
        written = [True] * len(self.completion)
        for start, stop in self.given:
            written[start:stop] = [False] * (stop - start)
        return written


def prompt_text(prompt: Prompt) -> str:
    """The text of a prompt; of a chat, the content of the last message.

    Example:
        >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
        'Why?'
    """
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named stream of random numbers, the hash of its arguments.

    Every random number of a run comes from a generator with such a seed, never from the global state, so it
    does not depend on earlier draws or on the process.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class EpisodeStart(NamedTuple):
    """How the rollouts of a row begin in an environment."""

    columns: dict[str, Any]
    """The row's columns, which `reset` receives by name."""
    observation: str | None
    """The text that `reset` returned before training; it ends the prompt."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of the data, tokenised; the demonstration is None if the row has no completion."""

    row: int
    """The row's number in its source, from 1, as error messages give it."""
    prompt: Prompt
    prompt_ids: TokenIds
    demonstration: str | None
    demonstration_ids: TokenIds | None
    """The expert's completion, including its end token; of several turns, all that follows the prompt."""
    demonstration_given: Given = ()
    rejected_ids: TokenIds | None = None
    """A completion that is worse than the demonstration; the discriminator is trained on it too, and it is
    the rejected one of a preference pair."""
    earlier_turns: tuple[Tokens, ...] = ()
    """Prompt and completion of each earlier assistant turn that only the SFT loss covers."""
    columns: dict[str, Any]
    """The other columns of the row, which reward functions receive by name."""
    episode: EpisodeStart | None = None
    """None without an environment."""

    @property
    def is_pair(self) -> bool:
        """Whether the row is a preference pair: equal completions would have no gradient."""
        return self.demonstration_ids is not None and self.rejected_ids not in (None, self.demonstration_ids)

    @property
    def demonstration_tokens(self) -> Tokens | None:
        """The prompt and the demonstration."""
        if self.demonstration_ids is None:
            return None
        return Tokens(self.prompt_ids, self.demonstration_ids, self.demonstration_given)

    @property
    def demonstrated_turns(self) -> tuple[Tokens, ...]:
        """Prompt and completion of every turn that the SFT loss covers, the demonstration last."""
        last = self.demonstration_tokens
        return (*self.earlier_turns, *(() if last is None else (last,)))


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Tool calls of a rollout."""

    calls: int = 0
    """Calls that were executed."""
    failures: tuple[int, ...] = ()
    """Indices of those without a tool of the name, with an exception, or without an answer in time."""
    malformed: int = 0
    """1 if the last turn begins a call that cannot be read."""
    unanswered: int = 0
    """Calls in the last turn, after the highest number of iterations."""

    @property
    def failed(self) -> int:
        """Number of executed calls that failed."""
        return len(self.failures)

    def __add__(self, other: "ToolUse") -> "ToolUse":
        """The use of both, one after the other."""
        return ToolUse(
            calls=self.calls + other.calls,
            failures=(*self.failures, *(self.calls + index for index in other.failures)),
            malformed=self.malformed + other.malformed,
            unanswered=self.unanswered + other.unanswered,
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled completion, as the sampler returned it."""

    completion_ids: TokenIds
    """All that follows the prompt: the sampled token ids, on which the policy is trained, with the end token
    or the stop string that ended them, and between turns what tools returned (`given`)."""
    sampling_logprobs: tuple[float, ...]
    """Nats, one per sampled token, of the policy at the sampling temperature: before a repetition penalty,
    and before min-p, top-k and top-p truncate the distribution, as in the loss."""
    finish_reason: Literal["stop", "length"]
    policy_version: int
    """The step whose weights the sampler used."""
    ref_logprobs: tuple[float, ...] | None = None
    """Nats, one per sampled token, under the KL reference; None in a step that does not use it."""
    given: Given = ()
    messages: tuple[dict[str, Any], ...] = ()
    """The turns and the results of tools as chat messages; empty without tools."""
    tool_use: ToolUse = field(default_factory=ToolUse)

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return len(self.sampling_logprobs)


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt, with their rewards and discriminator logits."""

    example: Example
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...] = ()
    """The decoded completions, for reward functions and logs; they are never tokenised again."""
    environments: tuple[Any, ...] = ()
    """The environment of each rollout until it is rewarded, in the process that sampled it; () without."""
    rewards: tuple[float | None, ...] = ()
    """Weighted sums over the reward functions; None for an unknown reward, which the mean excludes."""
    reward_parts: dict[str, tuple[float | None, ...]]
    """Reward function -> its value for each rollout."""
    extra: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    """Column -> what a reward function logged for each rollout by `log_extra`."""
    policy_logits: tuple[float, ...] | None = None
    """Not the language model's logits: the discriminator's logit of each rollout; None if they have none."""
    expert_logit: float | None = None
    """The discriminator's logit of the demonstration; None without a demonstration."""
    demonstration_ref_logprobs: tuple[float, ...] | None = None
    """Nats, one per token of the demonstration, under the KL reference; None if no component needs them."""

    def tokens(self, *, demonstration: bool) -> list[Tokens]:
        """The rollouts, and if wanted the demonstration after them, if there is one."""
        prompt, shown = self.example.prompt_ids, self.example.demonstration_tokens if demonstration else None
        found = [Tokens(prompt, rollout.completion_ids, rollout.given) for rollout in self.rollouts]
        return found if shown is None else [*found, shown]

    @property
    def completion_tokens(self) -> int:
        """Sampled tokens of all completions."""
        return sum(rollout.num_sampled for rollout in self.rollouts)


class Span(NamedTuple):
    """The position of a row's tokens in its padded row, and the number of its prompt."""

    start: int
    prompt_length: int
    length: int
    """Tokens of prompt and completion together."""
    prompt: int
    """Equal for rows with the same prompt."""


def packed_tokens(spans: Sequence[Span]) -> int:
    """Number of tokens without padding, each prompt counted once."""
    prompts = {span.prompt: span.prompt_length for span in spans}
    return sum(prompts.values()) + sum(span.length - span.prompt_length for span in spans)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Padded demonstrations and rollouts with one mask per loss component.

    Every [B, T] tensor is aligned with the token it refers to: `sft_mask[b, t]` is True if token t of row b
    enters S_sft, with its log-probability given the tokens before it.

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
    """Rollout tokens that the discriminator scored."""
    rollout_mask: Bool[Tensor, "B T"]
    """All rollout tokens that enter the loss, for the KL term, the entropy and the rollout metrics."""
    pref_mask: Bool[Tensor, "B T"]
    """Completion tokens of preference pairs, chosen and rejected."""
    chosen: Int[Tensor, " B"]
    """For the rejected completion of a pair, the row of the chosen one; -1 for all other rows."""
    advantages: Float[Tensor, " B"]
    adversarial_advantages: Float[Tensor, " B"]
    temperature: Float[Tensor, " B"]
    """The sampling temperature of rollouts, 1 for demonstrations."""
    sampling_logprobs: Float[Tensor, "B T"]
    """Nats, from the sampler; 0 outside `rollout_mask`."""
    ref_logprobs: Float[Tensor, "B T"]
    """Nats, under the KL reference; 0 outside `rollout_mask` and `pref_mask`, and in a step without it."""
    spans: tuple[Span, ...] = ()
    """One per row for packed rows; empty for padded rows."""
    teacher_logprobs: Float[Tensor, "B T K"] | None = None
    """Nats, under the teacher, of `teacher_ids`, or of the token itself (K = 1); None without a teacher."""
    teacher_ids: Int[Tensor, "B T K"] | None = None
    """The teacher's most likely tokens; None if it gives the log-probability of the token itself only."""

    @property
    def tokens(self) -> int:
        """Number of tokens in the forward pass: packed, or with padding."""
        return packed_tokens(self.spans) if self.spans else self.input_ids.numel()
