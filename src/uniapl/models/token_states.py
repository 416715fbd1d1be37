"""Log-probabilities and hidden states of completions under a model, without gradient."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniapl.data.batching import Row, batch_sequences, collate
from uniapl.models.policy import Extras
from uniapl.types import Tokens


@dataclass(frozen=True, kw_only=True)
class TokenStates:
    """What a model computes for the N written tokens of one completion."""

    logprobs: Tensor
    """[N], in nats, at the sampling temperature."""
    states: Tensor
    """[N, layers * D]: hidden states at the tokens' own positions; [N, 0] without layers."""

    def first(self, count: int) -> "TokenStates":
        """Those of the first tokens."""
        return TokenStates(logprobs=self.logprobs[:count], states=self.states[:count])


@dataclass(frozen=True, kw_only=True)
class TokenReader:
    """Runs a model on completions."""

    model: Any
    """Called like :class:`uniapl.models.policy.Policy`."""
    layers: tuple[int, ...]
    """Decoder layers whose states are returned, from 1."""
    temperature: float
    pad_id: int
    max_tokens: int
    """Tokens per batch; a batch has at least one sequence."""
    packed: bool
    """Read packed rows, which the model must support."""
    device: torch.device
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def read(self, sequences: Sequence[Tokens]) -> list[TokenStates]:
        """Return the states of each completion, in their order."""
        found: dict[int, TokenStates] = {}
        pairs = [tokens.pair for tokens in sequences]
        for indices in batch_sequences(pairs, max_tokens=self.max_tokens, packed=self.packed):
            rows = [self._row(sequences[index]) for index in indices]
            batch = collate(rows, pad_id=self.pad_id, packed=self.packed, device=self.device)
            inputs = (batch.input_ids, batch.attention_mask, batch.position_ids)
            with self.autocast():
                logprobs, _, *states = self.model(
                    *inputs, batch.sft_mask, batch.temperature, batch.spans, Extras(layers=self.layers)
                )
            lengths = [row.num_written for row in rows]
            parts = [s.split(lengths) for s in (logprobs[batch.sft_mask], *states)]
            for number, index in enumerate(indices):
                hidden = parts[1][number] if states else logprobs.new_empty(lengths[number], 0)
                found[index] = TokenStates(logprobs=parts[0][number], states=hidden)
        return [found[index] for index in range(len(sequences))]

    def _row(self, tokens: Tokens) -> Row:
        return Row(
            prompt_ids=tokens.prompt,
            completion_ids=tokens.completion,
            given=tokens.given,
            components=frozenset({"sft"}),
            temperature=self.temperature,
        )
