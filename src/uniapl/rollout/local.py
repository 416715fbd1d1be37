"""The sampler that runs in the training process, on the very weights that are trained."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from uniapl.rollout.fused import FusedDecoder, Weights, same_logits, supports_fused
from uniapl.rollout.plain import PlainDecoder
from uniapl.types import Rollout, TokenIds

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two looks at which rows have finished: an accelerator has to be waited for."""
BLOCK = 256
"""Probabilities that are summed before the draw looks at single ones. Our choice: near the root of V."""


Decoder = FusedDecoder | PlainDecoder
Answer = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class LocalSampler:
    """Sampling with any causal language model of transformers whose layers all keep a key-value cache.

    Each prompt is read once and its cache copied to its G rows; rows that have finished leave the batch.
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
    max_batch_size: int = 256
    """Rows decoded at the same time: bounds the cache's memory."""
    decoding: Literal["fused", "plain"] = "fused"
    """`plain` is the model's own forward: the reference, and what other models than `fused` knows get."""
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
        at_once = max(1, self.max_batch_size // num_generations)
        # Prompts of like length together: less padding. The longest first: what does not fit fails at once.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        rollouts: list[tuple[Rollout, ...]] = [()] * len(prompts)
        with self._evaluating():
            decoder = self._decoder()
            for start in range(0, len(order), at_once):
                chosen = order[start : start + at_once]
                uniforms = self._uniforms([seeds[i] for i in chosen], num_generations)
                rows = self._decode(decoder([prompts[i] for i in chosen], num_generations), uniforms)
                for place, index in enumerate(chosen):
                    group = rows[place * num_generations : (place + 1) * num_generations]
                    rollouts[index] = tuple(self._rollout(ids, lp, policy_version) for ids, lp in group)
        return rollouts

    def check(self) -> None:
        """Sample one token, to hear before training of a model that cannot be sampled from.

        Raises:
            UsageError: Its cache is none that the rows of a group can share.
        """
        probe = replace(self, max_completion_length=1)
        probe.sample([(self.pad_id,)], seeds=[0], num_generations=2, policy_version=0)

    @functools.cached_property
    def fused(self) -> bool:
        """Whether the fused decoder is used: it was asked for, knows the model, and gives the same logits."""
        if self.decoding == "plain" or not supports_fused(self.model):
            return False
        with self._evaluating():
            return same_logits(self.model)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.autocast():
                yield
        finally:
            self.model.train(was_training)

    def _decoder(self) -> Callable[[Sequence[TokenIds], int], Decoder]:
        """What makes the decoder of some prompts with G rows each, with the weights as they are now."""
        if not self.fused:
            return functools.partial(PlainDecoder, self.model, self.pad_id)
        return functools.partial(
            FusedDecoder, Weights(self.model), max_completion_length=self.max_completion_length
        )

    def _rollout(self, ids: list[int], logprobs: list[float], policy_version: int) -> Rollout:
        return Rollout(
            completion_ids=tuple(ids),
            sampling_logprobs=tuple(logprobs),
            finish_reason="stop" if ids[-1] in self.stop_ids else "length",
            policy_version=policy_version,
        )

    def _decode(self, decoder: Decoder, uniforms: Tensor) -> list[Answer]:
        """The answer of every row, the rows of a prompt side by side."""
        device = self.model.device
        look_every = LOOK_EVERY.get(device.type, LOOK_EVERY["cuda"])
        uniforms = uniforms.to(device)
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        total = len(uniforms)
        alive = torch.arange(total, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        sampled: list[tuple[Tensor, Tensor, Tensor]] = []
        logits = decoder.prefill()
        for position in range(self.max_completion_length):
            tokens, logprobs = self._choose(logits, uniforms[:, position])
            sampled.append((alive, tokens, logprobs))
            finished |= torch.isin(tokens, stop)
            if position + 1 == self.max_completion_length:
                break
            if (position + 1) % look_every == 0 and finished.any():
                keep = close_ranks(finished)
                if not len(keep):
                    break
                decoder.select(keep)
                alive, tokens, uniforms = alive[keep], tokens[keep], uniforms[keep]
                finished = finished[keep]
            logits = decoder.step(tokens)
        return self._answers(sampled, total)

    def _answers(self, sampled: list[tuple[Tensor, Tensor, Tensor]], total: int) -> list[Answer]:
        """Each row's answer, from the (rows, tokens, log-probs) of every position."""
        answers: list[Answer] = [([], []) for _ in range(total)]
        rows, tokens, logprobs = (torch.cat(column).tolist() for column in zip(*sampled, strict=True))
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            ids, of_row = answers[row]
            # A row that finished between two looks went on for a few tokens.
            if not ids or ids[-1] not in self.stop_ids:
                ids.append(token)
                of_row.append(logprob)
        return answers

    def _uniforms(self, seeds: list[int], num_generations: int) -> Tensor:
        """One number in [0, 1) per row and position, from each prompt's own seed."""
        shape = (num_generations, self.max_completion_length)
        return torch.cat(
            [
                torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )

    def _choose(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row, and its log-probability before top-k and top-p cut anything."""
        if self.temperature == 0:
            tokens = logits.max(dim=-1).indices
            probs = relative_probs(logits, temperature=1.0)
        else:
            probs = relative_probs(logits, temperature=self.temperature)
            tokens = inverse_cdf(truncate(probs, top_p=self.top_p, top_k=self.top_k), uniforms)
        chosen = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, chosen.log() - probs.sum(-1).log()


def close_ranks(finished: Tensor) -> Tensor:
    """The rows that go on, so that as few as possible move: the last ones take the places that come free."""
    count = int((~finished).sum())
    rows = torch.arange(count, device=finished.device)
    rows[finished[:count]] = count + (~finished[count:]).nonzero().squeeze(-1)
    return rows


def relative_probs(logits: Tensor, *, temperature: float) -> Tensor:
    """Probabilities beside the likeliest token's, in the place of the logits [R, V].

    With a large vocabulary a copy costs more than the arithmetic: nothing is copied, not even to normalise.
    """
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    if temperature != 1:
        logits.div_(temperature)
    return logits.exp_()


def truncate(probs: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Probabilities [R, V], up to a factor; those outside the k likeliest, and outside the nucleus, are 0.

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
    150,000 tokens fp32 sums would move probability between neighbours. It suffices for the sums of short
    blocks and the tokens of the block that is hit: where a number falls in its block is uniform again.
    """
    size = probs.shape[-1]
    if size <= BLOCK:
        return _pick(probs.double(), uniforms)[0]
    whole = size // BLOCK
    blocks = probs[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK)).sum(-1)
    rest = probs[:, whole * BLOCK :].sum(-1, keepdim=True)
    block, within = _pick(torch.cat([blocks, rest], dim=-1).double(), uniforms)
    columns = BLOCK * block.unsqueeze(-1) + torch.arange(BLOCK, device=probs.device)
    masses = probs.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0.0)
    # Probabilities that are no numbers, of a model that has diverged, hit anything.
    return (BLOCK * block + _pick(masses, within)[0]).clamp(max=size - 1)


def _pick(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of masses [R, N] the index that its number hits, and where in that mass, in [0, 1)."""
    edges = F.pad(masses.cumsum(-1), (1, 0))
    total = edges[:, -1:]
    # Rounding must not carry a target to the very end, behind which only tokens of probability 0 may follow.
    target = torch.minimum(uniforms.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    index = (torch.searchsorted(edges, target, right=True) - 1).clamp(0, masses.shape[-1] - 1)
    share = (target - edges.gather(-1, index)) / masses.gather(-1, index)
    return index.squeeze(-1), share.squeeze(-1)
