"""The sampler that runs in the training process, on the weights that are trained."""

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from uniapl.rollout import SampledTokens, SampleRequest
from uniapl.rollout.caches import Cache, RowCaches
from uniapl.rollout.fused import FusedDecoder, Weights, same_logits, supports_fused
from uniapl.rollout.plain import PlainDecoder
from uniapl.rollout.settings import SamplingSettings, warps
from uniapl.types import Rollout, TokenIds
from uniapl.untyped import items_of

CHECK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two checks for finished rows; on an accelerator every check is a synchronisation."""
BLOCK = 256
"""Size of the blocks in :func:`inverse_cdf`, near the square root of the vocabulary size. Our choice."""

Decoder = FusedDecoder | PlainDecoder


@dataclass(frozen=True, kw_only=True)
class LocalSampler:
    """Samples with any causal language model of transformers whose layers all have a key-value cache.

    Each prompt is read once and its cache is copied to its G rows. Finished rows leave the batch. With the
    fused decoder, a row that goes on after a tool's result continues from its cache.
    """

    model: PreTrainedModel
    settings: SamplingSettings
    """How tokens are drawn and what ends a completion."""
    pad_id: int
    max_batch_size: int = 256
    """Rows decoded at the same time; it limits the memory of the cache."""
    decoding: Literal["fused", "plain"] = "fused"
    """`plain` is the model's own forward pass, which models that `fused` does not support also use."""
    autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Training's precision context."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt, in the order of the prompts."""
        prompts, count = request.prompts, request.num_generations
        settings = self.settings.limited(request.max_completion_length)
        prompts_per_batch = max(1, self.max_batch_size // count)
        # Prompts of similar length share a batch, which saves padding. The longest come first: a batch that
        # does not fit in memory fails at once.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        rollouts: list[tuple[Rollout, ...]] = [()] * len(prompts)
        caches = request.caches
        known = RowCaches() if caches is None else caches.take_over()
        with self._evaluating():
            decoder = self._decoder(settings.max_completion_length)
            for start in range(0, len(order), prompts_per_batch):
                batch = order[start : start + prompts_per_batch]
                history = self._history([prompts[i] for i in batch], count)
                # The numbers do not depend on the limit.
                uniforms = self._uniforms([request.seeds[i] for i in batch], count)
                uniforms = uniforms[:, : settings.max_completion_length]
                batched = [prompts[i] for i in batch]
                rows, kept = self._decode(
                    decoder(batched, count, known=[known.find(prompt) for prompt in batched]),
                    uniforms,
                    history,
                    most_kept=0 if caches is None else self.max_batch_size - len(caches),
                )
                for place, index in enumerate(batch):
                    group = rows[place * count : (place + 1) * count]
                    rollouts[index] = settings.rollouts(group, request.policy_version)
                for row, cache in kept.items():
                    place, number = divmod(row, count)
                    completion = rollouts[batch[place]][number].completion_ids
                    assert caches is not None
                    caches.keep(batched[place] + completion, cache)
        return rollouts

    def check(self) -> None:
        """Sample one token.

        Raises:
            UsageError: The model has no key-value cache that the rows of a group can share.
        """
        probe = replace(self, settings=replace(self.settings, max_completion_length=1))
        probe.sample(SampleRequest(prompts=[(self.pad_id,)], seeds=[0], num_generations=2))

    @functools.cached_property
    def fused(self) -> bool:
        """Whether the fused decoder is used: it is configured, knows the model and gives the same logits."""
        if self.decoding == "plain" or not supports_fused(self.model):
            return False
        with self._evaluating():
            return same_logits(self.model)

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.autocast():
                yield
        finally:
            self.model.train(was_training)

    def _decoder(self, max_completion_length: int) -> Callable[..., Decoder]:
        """Return a function that makes the decoder of some prompts with G rows each."""
        if not self.fused:

            def plain(prompts: Sequence[TokenIds], count: int, **_: Any) -> PlainDecoder:
                return PlainDecoder(self.model, self.pad_id, prompts, count)

            return plain
        return functools.partial(
            FusedDecoder, Weights(self.model), max_completion_length=max_completion_length
        )

    def _decode(
        self, decoder: Decoder, uniforms: Tensor, history: Tensor | None, *, most_kept: int
    ) -> tuple[list[SampledTokens], dict[int, Cache]]:
        """Sample the completion of every row; a row that finished between two checks has a few tokens more.

        Args:
            decoder: Of the batch.
            uniforms: [rows, length], see :meth:`_uniforms`.
            history: See :meth:`_history`.
            most_kept: Finished rows whose caches may be kept.

        Returns:
            The completions, and the caches of rows that finished before the limit.
        """
        device, settings, strings = self.model.device, self.settings, self.settings.stop_strings
        check_every = CHECK_EVERY.get(device.type, CHECK_EVERY["cuda"])
        uniforms = uniforms.to(device)
        stop = torch.tensor(sorted(settings.stop_ids), device=device)
        completions: list[SampledTokens] = [([], []) for _ in range(len(uniforms))]
        rows = torch.arange(len(uniforms), device=device)
        finished = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
        windows = strings.windows(len(uniforms), device) if strings is not None else None
        sampled: list[tuple[Tensor, Tensor, Tensor]] = []
        kept: dict[int, Cache] = {}
        logits = decoder.prefill()
        length = uniforms.shape[1]
        for position in range(length):
            tokens, logprobs = self._choose(logits, uniforms[:, position], history)
            sampled.append((rows, tokens, logprobs))
            finished |= torch.isin(tokens, stop)
            if strings is not None and windows is not None:
                windows = torch.cat([windows[:, 1:], tokens.unsqueeze(-1)], dim=1)
                finished |= strings.complete(windows)
            if position + 1 == length:
                break
            history = None if history is None else torch.cat([history, tokens.unsqueeze(-1)], dim=1)
            if (position + 1) % check_every == 0 and finished.any():
                for place in items_of(finished.nonzero().flatten())[: most_kept - len(kept)]:
                    if (cache := decoder.row_cache(place)) is not None:
                        kept[int(rows[place])] = cache
                keep = unfinished_rows(finished)
                if not len(keep):
                    break
                decoder.select(keep)
                rows, tokens, uniforms, finished = (x[keep] for x in (rows, tokens, uniforms, finished))
                windows, history = (None if x is None else x[keep] for x in (windows, history))
            logits = decoder.step(tokens)
        columns = (items_of(torch.cat(column)) for column in zip(*sampled, strict=True))
        for row, token, logprob in zip(*columns, strict=True):
            ids, values = completions[int(row)]
            ids.append(token)
            values.append(logprob)
        return completions, kept

    def _history(self, prompts: Sequence[TokenIds], num_generations: int) -> Tensor | None:
        """The tokens of each row, for the repetition penalty; None without one.

        A shorter prompt repeats its first token in place of padding: its set of tokens does not change.
        """
        if self.settings.repetition_penalty == 1:
            return None
        width = max(len(prompt) for prompt in prompts)
        padded = [(prompt[0],) * (width - len(prompt)) + tuple(prompt) for prompt in prompts]
        return torch.tensor(padded, device=self.model.device).repeat_interleave(num_generations, dim=0)

    def _uniforms(self, seeds: list[int], num_generations: int) -> Tensor:
        """One number in [0, 1) per row and position, drawn with the seed of the row's prompt."""
        shape = (num_generations, self.settings.max_completion_length)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.cat([torch.rand(shape, dtype=torch.float64, generator=g) for g in generators])

    def _choose(self, logits: Tensor, uniforms: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next token of each row, and its log-probability before the penalty and the truncation."""
        temperature = self.settings.temperature
        if warps(self.settings):
            # The probability of a token that the penalty makes likely can be too small for fp32.
            logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
            warped = self.settings.processors(history, logits)  # type: ignore[arg-type]
            if temperature == 0:
                tokens = warped.max(dim=-1).indices
            else:
                tokens = inverse_cdf(relative_probs(warped, temperature=1.0), uniforms)
            return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if temperature == 0:
            tokens = logits.max(dim=-1).indices
            probs = relative_probs(logits, temperature=1.0)
        else:
            probs = relative_probs(logits, temperature=temperature)
            tokens = inverse_cdf(probs, uniforms)
        chosen = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, chosen.log() - probs.sum(-1).log()


def unfinished_rows(finished: Tensor) -> Tensor:
    """Indices of the unfinished rows; the last of them fill the gaps, so that few rows have to move."""
    count = int((~finished).sum())
    rows = torch.arange(count, device=finished.device)
    rows[finished[:count]] = count + (~finished[count:]).nonzero().squeeze(-1)
    return rows


def relative_probs(logits: Tensor, *, temperature: float) -> Tensor:
    """Probabilities relative to the most likely token's, computed in place from the logits [R, V].

    With a large vocabulary a copy costs more than the arithmetic, so nothing is copied or normalised.
    """
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    if temperature != 1:
        logits.div_(temperature)
    return logits.exp_()


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative probability exceeds uniform x total mass.

    One uniform number per token makes the draw of a row independent of the other rows. The sums need fp64:
    with 150,000 tokens, fp32 would move probability between neighbours. Only the sums of blocks and the
    tokens of the block that is hit are summed in fp64; the position inside that block is uniform again.
    """
    size = probs.shape[-1]
    if size <= BLOCK:
        return _pick(probs.double(), uniforms)[0]
    count = size // BLOCK
    blocks = probs[:, : count * BLOCK].view(-1, count, BLOCK).sum(-1)
    rest = probs[:, count * BLOCK :].sum(-1, keepdim=True)
    block, within = _pick(torch.cat([blocks, rest], dim=-1).double(), uniforms)
    columns = BLOCK * block.unsqueeze(-1) + torch.arange(BLOCK, device=probs.device)
    masses = probs.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0.0)
    # NaN probabilities of a diverged model can give any index.
    return (BLOCK * block + _pick(masses, within)[0]).clamp(max=size - 1)


def _pick(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The index in each row of masses [R, N] that its number hits, and its position there in [0, 1)."""
    edges = F.pad(masses.cumsum(-1), (1, 0))
    total = edges[:, -1:]
    # Rounding must not move a target to the total, where only tokens of probability 0 can follow.
    target = torch.minimum(uniforms.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    index = (torch.searchsorted(edges, target, right=True) - 1).clamp(0, masses.shape[-1] - 1)
    fraction = (target - edges.gather(-1, index)) / masses.gather(-1, index)
    return index.squeeze(-1), fraction.squeeze(-1)
