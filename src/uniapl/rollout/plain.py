"""Decoding by the model's own forward: the reference, for all models whose layers keep a key-value cache."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from uniapl.errors import UsageError
from uniapl.types import TokenIds


class PlainDecoder:
    """Answers in the making: `prefill` once, then `step` by `step`, with `select` in between.

    Prompts are padded on the left, with positions that ignore the padding; a prompt's cache is expanded to
    its rows.
    """

    def __init__(
        self, model: PreTrainedModel, pad_id: int, prompts: Sequence[TokenIds], num_generations: int
    ) -> None:
        """Lay the prompts out."""
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        device = model.device
        self.model, self.num_generations = model, num_generations
        padded = [[pad_id] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]
        self.prompts = torch.tensor(padded, device=device)
        first = torch.tensor(padding, device=device).unsqueeze(-1)
        self.attention_mask = (torch.arange(width, device=device) >= first).long()
        self.accepted = inspect.signature(model.forward).parameters
        self.cache: Cache | None = None

    def prefill(self) -> Tensor:
        """The logits behind the prompts, each of which is read once, for all rows: [rows, vocabulary].

        Raises:
            UsageError: The model has no cache, or none that the rows of a group can share.
        """
        name = type(self.model).__name__
        logits = self._forward(self.prompts)
        if self.cache is None:
            raise UsageError(f"{name} keeps no key-value cache to sample with")
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in self.cache.layers):
            raise UsageError(
                f"{name} has layers without a key-value cache (state-space or linear attention): the local "
                "sampler cannot expand a prompt's cache to its rollouts"
            )
        self.cache.batch_repeat_interleave(self.num_generations)
        self.attention_mask = self.attention_mask.repeat_interleave(self.num_generations, dim=0)
        return logits.repeat_interleave(self.num_generations, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits behind one more token of each row, [n, vocabulary]."""
        ones = self.attention_mask.new_ones(len(tokens), 1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        return self._forward(tokens.unsqueeze(-1))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows: the first becomes what row `rows[0]` was, and so on."""
        assert self.cache is not None
        self.cache.batch_select_indices(rows)
        self.attention_mask = self.attention_mask[rows]

    def _forward(self, input_ids: Tensor) -> Tensor:
        optional: dict[str, Any] = {}
        if "position_ids" in self.accepted:
            positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
            optional["position_ids"] = positions[:, -input_ids.shape[1] :]
        if "logits_to_keep" in self.accepted:
            optional["logits_to_keep"] = 1
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            **optional,
        )
        cache = output.get("past_key_values")
        self.cache = cache if isinstance(cache, Cache) else None
        return output.logits[:, -1].float()
