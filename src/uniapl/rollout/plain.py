"""Decoding with the model's own forward pass, for all models whose layers have a key-value cache."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from uniapl.errors import UsageError
from uniapl.types import TokenIds


class AutocastCache(DynamicCache):
    """A key-value cache in the precision of autocast.

    Under autocast a model computes keys in fp32, because its rotary embedding does, and attention casts all
    of them at every token. Casting each key once gives the same values in half of the memory.
    """

    def __init__(self, layers: Sequence[DynamicLayer], dtype: torch.dtype) -> None:
        """Take over the layers of the model's own cache."""
        super().__init__()
        self.dtype, self.layers = dtype, [*layers]
        for layer in layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens to a layer; return all of its keys and values."""
        key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        return cast("Any", super()).update(key_states, value_states, layer_idx, *args, **kwargs)


class PlainDecoder:
    """Decodes a batch: `prefill` once, then `step` per token, with `select` in between.

    Prompts are padded on the left, with position ids that skip the padding.
    """

    def __init__(
        self, model: PreTrainedModel, pad_id: int, prompts: Sequence[TokenIds], num_generations: int
    ) -> None:
        """Pad the prompts."""
        width = max(len(prompt) for prompt in prompts)
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
        self.model, self.num_generations = model, num_generations
        self.prompts = torch.tensor(padded, device=model.device)
        self.attention_mask = (torch.arange(width, device=model.device) >= width - lengths).long()
        self.accepted = inspect.signature(model.forward).parameters
        self.cache: Cache | None = None

    def prefill(self) -> Tensor:
        """Read each prompt once; return the next token's logits of all rows, [rows, vocabulary]."""
        name = type(self.model).__name__
        logits = self._forward(self.prompts)
        if self.cache is None:
            raise UsageError(f"{name} has no key-value cache, which the local sampler needs")
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in self.cache.layers):
            raise UsageError(
                f"{name} has layers without a key-value cache (state-space or linear attention): the local "
                "sampler cannot expand the cache of a prompt to its rollouts"
            )
        device = self.prompts.device.type
        if torch.is_autocast_enabled(device) and type(self.cache) is DynamicCache:
            layers = [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
            # Layers of other classes keep more than keys and values.
            if len(layers) == len(self.cache.layers):
                self.cache = AutocastCache(layers, torch.get_autocast_dtype(device))
        self.cache.batch_repeat_interleave(self.num_generations)
        self.attention_mask = self.attention_mask.repeat_interleave(self.num_generations, dim=0)
        return logits.repeat_interleave(self.num_generations, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row; return the logits of the next one, [rows, vocabulary]."""
        ones = self.attention_mask.new_ones(len(tokens), 1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        return self._forward(tokens.unsqueeze(-1))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        assert self.cache is not None
        self.cache.batch_select_indices(rows)
        self.attention_mask = self.attention_mask[rows]

    def row_cache(self, row: int) -> None:
        """Nothing: the caches of some models have a form of their own. A row that goes on is read again."""

    def _forward(self, input_ids: Tensor) -> Tensor:
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        )
        cache = output.get("past_key_values")
        self.cache = cache if isinstance(cache, Cache) else None
        return output.logits[:, -1].float()
