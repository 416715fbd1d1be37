"""Log-probabilities of selected tokens and the entropy of each position, without the full logits tensor."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_LOGITS = 2**26
"""Logits in memory at once in `selected_logprobs`: 256 MiB in fp32 (our choice: large enough for efficient
matrix products, small compared with the weights of a model with a large vocabulary)."""


def logprobs_from_logits(
    logits: Float[Tensor, "N V"],
    token_ids: Int[Tensor, "N *K"],
    temperature: Float[Tensor, " N"],
    *,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "N *K"], Float[Tensor, " N"]]:
    """Log-probability of one or K tokens per row and the row's entropy, of softmax(logits / temperature).

    Args:
        logits: Carries the gradient.
        token_ids: One token per row, or K.
        temperature: Positive; the sampling temperature for rollouts, 1 for demonstrations.
        entropy_gradient: Whether the entropy carries a gradient; without one it is a metric.

    Returns:
        `logprobs` and `entropy`, in nats.
    """
    scaled = logits / temperature.unsqueeze(-1)
    logprobs = torch.log_softmax(scaled, dim=-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, _columns(token_ids)).view(token_ids.shape), entropy


def selected_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    token_ids: Int[Tensor, "N *K"],
    temperature: Float[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    chunk_size: int | None = None,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "N *K"], Float[Tensor, " N"]]:
    """`logprobs_from_logits` of `hidden @ weight.T + bias`, computed in chunks of rows.

    Only the logits of one chunk are in memory. The backward pass recomputes them, except those of a single
    chunk. With V = 151,936 the full tensor takes 0.6 MB per token and copy; this function takes two to four
    times `CHUNK_LOGITS`, of which a single chunk keeps one for the backward pass. Source: our choice; the
    idea is common (Liger, TRL, cut cross-entropy, arXiv 2411.09009).

    Args:
        hidden: Last hidden states of the positions that predict `token_ids`; carries the gradient. The matrix
            products are computed in its dtype, sums and exponentials in fp32 (or fp64).
        weight: Weight of the language-model head, in any floating dtype; carries the gradient.
        token_ids: One token per row, or K.
        temperature: Positive, one per row.
        bias: Bias of the head, if it has one.
        chunk_size: Rows per chunk; by default as many as have `CHUNK_LOGITS` logits.
        entropy_gradient: Whether the entropy carries a gradient, whose backward pass needs one more copy of a
            chunk's logits.

    Returns:
        `logprobs` and `entropy` (nats, fp32 or wider).
    """
    chunk_size = chunk_size or max(1, CHUNK_LOGITS // weight.shape[0])
    # Function.apply has no type annotations.
    function = cast("Any", _SelectedLogprobs)
    ids = _columns(token_ids)
    logprobs, entropy = function.apply(hidden, weight, bias, ids, temperature, chunk_size, entropy_gradient)
    return logprobs.view(token_ids.shape), entropy


def top_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    temperature: Float[Tensor, " N"],
    *,
    k: int,
    bias: Float[Tensor, " V"] | None = None,
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """The `k` most likely tokens of each row and their log-probabilities, in the chunks of
    `selected_logprobs` and with its arguments; without gradient."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.to(hidden.dtype)
    ids = hidden.new_empty((len(hidden), k), dtype=torch.int64)
    logprobs = hidden.new_empty((len(hidden), k), dtype=dtype)
    with torch.no_grad():
        for rows in _chunks(len(hidden), max(1, CHUNK_LOGITS // weight.shape[0])):
            logits = _scaled_logits(hidden[rows], head, bias, temperature[rows], dtype)
            found = logits.topk(k, dim=-1)
            ids[rows], logprobs[rows] = found.indices, found.values - logits.logsumexp(-1, keepdim=True)
    return ids, logprobs


class _SelectedLogprobs(torch.autograd.Function):
    """d logprob / d logit_v = (1[v = token] - p_v) / temperature, with p the softmax, which is recomputed.

    `token_ids` is [N, K]; the gradients of a row's K log-probabilities add up.

    d entropy / d logit_v = - p_v (log p_v + entropy) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: Tensor,
        chunk_size: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        out_dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(token_ids.shape, dtype=out_dtype)
        entropy, log_partition = (hidden.new_empty(hidden.shape[0], dtype=out_dtype) for _ in range(2))
        head = weight.to(hidden.dtype)
        chunks = _chunks(hidden.shape[0], chunk_size)
        kept = None
        for rows in chunks:
            logits = _scaled_logits(hidden[rows], head, bias, temperature[rows], out_dtype)
            highest = logits.amax(-1, keepdim=True)
            probs = (logits - highest).exp_()
            total = probs.sum(-1)
            log_partition[rows] = highest.squeeze(-1) + total.log()
            logprobs[rows] = logits.gather(-1, token_ids[rows]) - log_partition[rows, None]
            entropy[rows] = log_partition[rows] - torch.einsum("nv,nv->n", probs, logits) / total
            kept = probs.div_(total.unsqueeze(-1)) if len(chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, token_ids, temperature, log_partition, entropy, kept)
        ctx.chunk_size, ctx.entropy_gradient = chunk_size, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, token_ids, temperature, log_partition, entropy, kept = ctx.saved_tensors
        grad_logprobs: Tensor = grads[0]
        grad_entropy: Tensor | None = grads[1] if ctx.entropy_gradient else None
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are summed in the wide dtype, because bf16 sums would lose small terms.
        wide = log_partition.dtype
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for rows in _chunks(hidden.shape[0], ctx.chunk_size):
            factors = grad_logprobs[rows] / temperature[rows, None]
            factor = factors.sum(-1, keepdim=True)
            if kept is None:
                logits = _scaled_logits(hidden[rows], head, bias, temperature[rows], wide)
                probs = logits.sub_(log_partition[rows, None]).exp_()
            else:
                probs = kept
            by_entropy = None
            if grad_entropy is not None:
                scale = (grad_entropy[rows] / temperature[rows]).unsqueeze(-1)
                # xlogy is 0 where a probability underflows to 0.
                by_entropy = torch.xlogy(probs, probs).addcmul_(probs, entropy[rows, None]).mul_(-scale)
            grad_logits = probs.mul_(-factor) if kept is None else probs * -factor
            if by_entropy is not None:
                grad_logits += by_entropy
            grad_logits.scatter_add_(-1, token_ids[rows], factors)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ head
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _columns(token_ids: Tensor) -> Tensor:
    return token_ids.unsqueeze(-1) if token_ids.ndim == 1 else token_ids


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _scaled_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: Tensor, dtype: torch.dtype
) -> Tensor:
    logits = (hidden @ head.T).to(dtype)
    if bias is not None:
        logits += bias
    return logits.div_(temperature.unsqueeze(-1))
