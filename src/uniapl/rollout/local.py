"""The sampler that runs in the training process, on the very weights that are trained."""

import contextlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from uniapl.errors import UsageError
from uniapl.types import Rollout, TokenIds


@dataclass(frozen=True, kw_only=True)
class LocalSampler:
    """Sampling with any causal language model of transformers whose layers all keep a key-value cache.

    Each prompt is prefilled once and its cache expanded to its G rows; prompts are padded on the left, with
    positions that ignore the padding; rows that have finished leave the batch.
    """

    model: PreTrainedModel
    stop_ids: Collection[int]
    """Tokens that end an answer; they are part of it."""
    pad_id: int
    max_completion_length: int
    temperature: float = 1.0
    """0 takes the likeliest token, for evaluation; log-probabilities are then those of temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    max_rows: int = 256
    """Rows decoded at the same time: bounds the cache's memory."""
    autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """The precision context that training uses, so that both compute the same."""

    def sample(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> list[tuple[Rollout, ...]]:
        """`num_generations` rollouts for each prompt, in the prompts' order. See :class:`Sampler`."""
        at_once = max(1, self.max_rows // num_generations)
        # Prompts of like length together: less padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rollouts: list[tuple[Rollout, ...]] = [()] * len(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), at_once):
                chosen = order[start : start + at_once]
                with torch.inference_mode(), self.autocast():
                    rows = self._decode(
                        [prompts[i] for i in chosen], [seeds[i] for i in chosen], num_generations
                    )
                for place, index in enumerate(chosen):
                    group = rows[place * num_generations : (place + 1) * num_generations]
                    rollouts[index] = tuple(self._rollout(ids, lp, policy_version) for ids, lp in group)
        finally:
            self.model.train(was_training)
        return rollouts

    def check(self) -> None:
        """Sample one token, to hear before training of a model that cannot be sampled from.

        Raises:
            UsageError: Its cache is none that the rows of a group can share.
        """
        probe = replace(self, max_completion_length=1)
        probe.sample([(self.pad_id,)], seeds=[0], num_generations=2, policy_version=0)

    def _rollout(self, ids: list[int], logprobs: list[float], policy_version: int) -> Rollout:
        return Rollout(
            completion_ids=tuple(ids),
            sampling_logprobs=tuple(logprobs),
            finish_reason="stop" if ids[-1] in self.stop_ids else "length",
            policy_version=policy_version,
        )

    def _decode(
        self, prompts: list[TokenIds], seeds: list[int], num_generations: int
    ) -> list[tuple[list[int], list[float]]]:
        """(ids, log-probs) of every row, the rows of a prompt side by side."""
        device = self.model.device
        uniforms = self._uniforms(seeds, num_generations).to(device)
        logits, cache, attention_mask = self._prefill(prompts)
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            raise UsageError(
                f"{type(self.model).__name__} has layers without a key-value cache (state-space or linear "
                "attention): the local sampler cannot expand a prompt's cache to its rollouts"
            )
        cache.batch_repeat_interleave(num_generations)
        logits = logits.repeat_interleave(num_generations, dim=0)
        attention_mask = attention_mask.repeat_interleave(num_generations, dim=0)
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        total = len(prompts) * num_generations
        alive = torch.arange(total, device=device)
        ids = torch.zeros(total, self.max_completion_length, dtype=torch.int64, device=device)
        logprobs = torch.zeros(total, self.max_completion_length, device=device)
        lengths = torch.full((total,), self.max_completion_length, device=device)
        for position in range(self.max_completion_length):
            tokens, chosen = self._choose(logits, uniforms[alive, position])
            ids[alive, position], logprobs[alive, position] = tokens, chosen
            finished = torch.isin(tokens, stop)
            if finished.any():
                lengths[alive[finished]] = position + 1
                keep = (~finished).nonzero().squeeze(-1)
                alive, tokens, attention_mask = alive[keep], tokens[keep], attention_mask[keep]
                if not len(alive):
                    break
                cache.batch_select_indices(keep)
            if position + 1 < self.max_completion_length:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(alive), 1)], dim=1)
                logits = self._forward(tokens.unsqueeze(-1), attention_mask, cache)[0]
        return [
            (row_ids[:length], row_logprobs[:length])
            for row_ids, row_logprobs, length in zip(
                ids.tolist(), logprobs.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _uniforms(self, seeds: list[int], num_generations: int) -> Tensor:
        """One number in [0, 1) per row and position, from each prompt's own seed."""
        shape = (num_generations, self.max_completion_length)
        return torch.cat(
            [
                torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )

    def _prefill(self, prompts: list[TokenIds]) -> tuple[Tensor, Cache, Tensor]:
        device = self.model.device
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self.pad_id, device=device)
        attention_mask = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            attention_mask[row, width - len(prompt) :] = 1
        logits, cache = self._forward(input_ids, attention_mask, None)
        return logits, cache, attention_mask

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """The logits behind the last token of each row, and the grown cache."""
        accepted = inspect.signature(self.model.forward).parameters
        optional: dict[str, Any] = {}
        if "position_ids" in accepted:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            optional["position_ids"] = positions[:, -input_ids.shape[1] :]
        if "logits_to_keep" in accepted:
            optional["logits_to_keep"] = 1
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **optional,
        )
        if not isinstance(output.get("past_key_values"), Cache):
            raise UsageError(f"{type(self.model).__name__} keeps no key-value cache to sample with")
        return output.logits[:, -1].float(), output.past_key_values

    def _choose(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row, and its log-probability before top-k and top-p cut anything."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = inverse_cdf(truncate(logprobs.exp(), top_p=self.top_p, top_k=self.top_k), uniforms)
        return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def truncate(probs: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Probabilities [R, V] with those outside the k likeliest, and outside the nucleus, set to 0.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p of what top-k has left (the
    order and the renormalisation that transformers uses). Not normalised again.
    """
    if 0 < top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = torch.where(probs >= kth, probs, 0.0)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        ordered = torch.where(mass_before < top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    return probs


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """For each row the first token whose cumulative probability exceeds uniform x total mass.

    One uniform number per token makes a row's draw independent of the rows beside it. Summed in fp64: with
    150,000 tokens fp32 sums would move probability between neighbours.
    """
    cumulative = probs.double().cumsum(-1)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
