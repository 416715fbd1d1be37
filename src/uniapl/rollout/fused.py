"""Decoding with few tensor operations per token, for Llama, Mistral, Qwen2, Qwen3 and similar models.

The arithmetic and the weights are the model's own. One matrix product computes queries, keys and values, one
computes gate and up; the cache is allocated once; heads that share a key attend together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.rollout.caches import Cache
from uniapl.rollout.plain import PlainDecoder
from uniapl.types import TokenIds

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

Masks = dict[int | None, Tensor | None]
"""Attention window -> True where a token attends to a column; None if it attends to all."""


def supports_fused(model: PreTrainedModel) -> bool:
    """Whether the model has exactly the parameters that this module knows.

    :func:`same_logits` finds models that compute something else with them.
    """
    parts: Any = model
    outside = {name for name, _ in model.named_parameters() if not name.startswith("model.layers.")}
    if outside - {"lm_head.weight", "lm_head.bias"} != {"model.embed_tokens.weight", "model.norm.weight"}:
        return False
    rotary: Any = getattr(parts.model, "rotary_emb", None)
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return (
        type(getattr(parts, "lm_head", None)) is nn.Linear
        and hasattr(parts.model.norm, "variance_epsilon")
        # An untrained model has logits too small for same_logits to detect the cap.
        and not getattr(model.config, "final_logit_softcapping", None)
        and kinds <= {"full_attention", "sliding_attention"}
        and hasattr(rotary, "inv_freq")
        # Their angles depend on the length of the sequence.
        and rotary.rope_type not in ("dynamic", "longrope")
        and all(_supports_layer(layer, rotated=2 * rotary.inv_freq.numel()) for layer in parts.model.layers)
    )


def _supports_layer(layer: nn.Module, *, rotated: int) -> bool:
    names = {name for name, _ in layer.named_parameters()}
    required = {f"{name}.weight" for name in PROJECTIONS + NORMS}
    per_head = {f"{name}.weight" for name in HEAD_NORMS}
    known = required | per_head | {f"{name}.bias" for name in PROJECTIONS}
    if not required <= names <= known or per_head & names not in (set(), per_head):
        return False
    projections: list[Any] = [layer.get_submodule(name) for name in PROJECTIONS]
    norms: list[Any] = [layer.get_submodule(name) for name in NORMS]
    head_norms: list[Any] = [layer.get_submodule(name) for name in HEAD_NORMS if per_head <= names]
    attention: Any = layer.get_submodule("self_attn")
    biased = [projection.bias is not None for projection in projections]
    return (
        all(type(projection) is nn.Linear for projection in projections)
        and len(set(biased[:3])) == len(set(biased[4:6])) == 1
        and all(hasattr(norm, "variance_epsilon") for norm in norms + head_norms)
        and all(norm.weight.shape == (attention.head_dim,) for norm in head_norms)
        and attention.head_dim == rotated
    )


@torch.inference_mode()
def same_logits(model: PreTrainedModel) -> bool:
    """Whether both decoders give the same logits for two prompts and a few tokens after them.

    A sliding window is shortened for the comparison, because some models ignore the one they configure.
    """
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    if window is not None:
        config.sliding_window = 3
    try:
        weights, prompts = Weights(model), [(0, 1, 2, 3, 4), (5, 6, 7)]
        fused = FusedDecoder(weights, prompts, 2, max_completion_length=3)
        plain = PlainDecoder(model, 0, prompts, 2)
        logits, expected = [fused.prefill()], [plain.prefill()]
        tokens = torch.arange(4, device=model.device)
        for _ in range(3):
            logits.append(fused.step(tokens))
            expected.append(plain.step(tokens))
    finally:
        if window is not None:
            config.sliding_window = window
    difference = (torch.stack(logits) - torch.stack(expected)).abs().max()
    tolerance = 1e-4 if weights.dtype == torch.float32 else 2e-2
    return bool(difference <= tolerance * torch.stack(expected).abs().max())


class Projection(NamedTuple):
    """A linear map of rows [n, in]."""

    weight: Tensor
    """[in, out]: on a CPU up to twice as fast as [out, in] for eight rows."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it in the weight's precision."""
        x = x.to(self.weight.dtype)
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Norm(NamedTuple):
    """Root mean square normalisation of the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it in the precision of x."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Layer(NamedTuple):
    """The joined weights of one layer."""

    attention_norm: Norm
    qkv: Projection
    head_norm: Norm | None
    """Normalises queries and keys; its weight is [heads + key heads, head_dim]."""
    out: Projection
    mlp_norm: Norm
    gate_up: Projection
    activation: nn.Module
    down: Projection
    window: int | None
    """Number of tokens that a token attends to, itself included; None attends to all."""


class Weights:
    """The current weights of a model, in the precision of the active autocast."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Copy all weights but the embedding and the norms."""
        parts: Any = model
        attention = parts.model.layers[0].self_attn
        device = model.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        self.embedding: Tensor = parts.model.embed_tokens.weight
        self.layers = [
            _read_layer(layer, _window(parts.config, index), self.dtype)
            for index, layer in enumerate(parts.model.layers)
        ]
        self.windows = {layer.window for layer in self.layers}
        self.norm = _norm(parts.model.norm)
        self.head = _join([parts.lm_head], self.dtype)
        self.rotary: nn.Module = parts.model.rotary_emb
        self.scaling: float = attention.scaling
        self.head_dim: int = attention.head_dim
        self.key_heads: int = attention.k_proj.out_features // self.head_dim
        self.heads: int = attention.q_proj.out_features // self.head_dim

    def rotations(self, positions: Tensor) -> Tensor:
        """Return for each position the complex numbers [head_dim / 2] that rotate the pairs of a head."""
        cos, sin = self.rotary(torch.empty(0, device=positions.device), positions.unsqueeze(0))
        half = self.head_dim // 2
        return torch.complex(cos[0, :, :half], sin[0, :, :half])


def _read_layer(layer: Any, window: int | None, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    head_dim, device = attention.head_dim, attention.q_proj.weight.device
    queries, keys, values = (p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    # The models keep the two outputs that the rotary embedding rotates together half a head apart. This
    # order makes them neighbours, one complex number, so that one product rotates all pairs. Queries and
    # keys are reordered alike, which leaves their scores unchanged.
    paired = torch.arange(queries + keys, device=device)
    paired = paired.view(-1, 2, head_dim // 2).transpose(1, 2).flatten()
    order = torch.cat([paired, torch.arange(queries + keys, queries + keys + values, device=device)])
    head_norm = None
    if hasattr(attention, "q_norm"):
        query_norm = attention.q_norm.weight.repeat(queries // head_dim)
        key_norm = attention.k_norm.weight.repeat(keys // head_dim)
        weight = torch.cat([query_norm, key_norm])[paired].view(-1, head_dim)
        head_norm = Norm(weight, attention.q_norm.variance_epsilon)
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj], dtype, order=order),
        head_norm=head_norm,
        out=_join([attention.o_proj], dtype),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_join([mlp.gate_proj, mlp.up_proj], dtype),
        activation=mlp.act_fn,
        down=_join([mlp.down_proj], dtype),
        window=window,
    )


def _join(linears: Sequence[nn.Linear], dtype: torch.dtype, *, order: Tensor | None = None) -> Projection:
    """One projection with the outputs of several, in the given order."""
    # A single weight, such as the large output head, is not copied twice.
    weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    biases: list[Tensor] = [x for linear in linears if (x := getattr(linear, "bias", None)) is not None]
    bias = torch.cat(biases) if biases else None
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return Projection(weight.to(dtype).T.contiguous(), None if bias is None else bias.to(dtype))


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


class FusedDecoder:
    """Decodes a batch: `prefill` once, then `step` per token, with `select` in between.

    The latest tokens of all rows are in the same column of the cache; shorter prompts start further right.
    The remaining rows are always the first ones, so that every step works on views of the cache.
    """

    def __init__(
        self,
        weights: Weights,
        prompts: Sequence[TokenIds],
        num_generations: int,
        max_completion_length: int,
        known: Sequence[Cache | None] = (),
    ) -> None:
        """Allocate the cache for all tokens of all rows.

        Args:
            weights: The model's.
            prompts: Token ids of each.
            num_generations: Rows of each prompt.
            max_completion_length: Tokens that may follow a prompt.
            known: For each prompt, the cache of some of its first tokens, not of all; empty if none has one.
        """
        device = weights.embedding.device
        self.known = known or [None] * len(prompts)
        self.weights, self.prompts, self.num_generations = weights, prompts, num_generations
        self.width = max(len(prompt) for prompt in prompts)
        self.columns = torch.arange(self.width + max_completion_length, device=device)
        self.rotations = weights.rotations(self.columns)
        rows = len(prompts) * num_generations
        shape = (len(weights.layers), rows, weights.key_heads, len(self.columns), weights.head_dim)
        self.keys = torch.empty(shape, dtype=weights.dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        """Number of filled columns."""
        self.start = torch.tensor([self.width - len(prompt) for prompt in prompts], device=device)
        """The column of each row's first token."""
        self.seen: Tensor | None = None
        """[rows, 1, 1, columns], True from a row's first token on; None if all rows start in column 0."""

    def prefill(self) -> Tensor:
        """Read each prompt once; return the next token's logits of all rows, [rows, vocabulary]."""
        padded = [(0,) * (self.width - len(prompt)) + tuple(prompt) for prompt in self.prompts]
        self._copy_known()
        masks: Masks = {window: self._causal_mask(window) for window in self.weights.windows}
        logits = self._forward(torch.tensor(padded, device=self.start.device)[:, self.length :], masks)
        # One layer after the other, so that only one is in memory twice.
        for cache in (*self.keys, *self.values):
            prompts = cache[: len(padded), :, : self.width]
            cache[:, :, : self.width] = prompts.repeat_interleave(self.num_generations, dim=0)
        self.start = self.start.repeat_interleave(self.num_generations)
        if len({len(prompt) for prompt in self.prompts}) > 1:
            self.seen = (self.columns >= self.start.unsqueeze(-1))[:, None, None]
        return logits.repeat_interleave(self.num_generations, dim=0)

    def _copy_known(self) -> None:
        """Fill the columns that need not be computed for any prompt."""
        known = [0 if cache is None else cache.keys.shape[2] for cache in self.known]
        unknown = (len(prompt) - tokens for prompt, tokens in zip(self.prompts, known, strict=True))
        self.length = self.width - max(unknown)
        for ours in (self.keys, self.values):
            # Attention to padding has weight 0, and 0 times what the memory held may be NaN.
            ours[:, : len(known), :, : self.length] = 0
        for row, (cache, tokens) in enumerate(zip(self.known, known, strict=True)):
            if cache is not None:
                first = self.width - len(self.prompts[row])
                self.keys[:, row, :, first : first + tokens] = cache.keys
                self.values[:, row, :, first : first + tokens] = cache.values
        self.known = ()

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row; return the logits of the next one, [rows, vocabulary]."""
        masks: Masks = dict.fromkeys(self.weights.windows)
        if self.seen is not None:
            masks = {w: self.seen[..., self._first(w) : self.length + 1] for w in masks}
        return self._forward(tokens.unsqueeze(-1), masks)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        places = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        for cache in (self.keys, self.values):
            cache[:, places, :, : self.length] = cache[:, rows[places], :, : self.length]
        self.start = self.start[rows]
        if self.seen is not None:
            self.seen = self.seen[rows]

    def row_cache(self, row: int) -> Cache:
        """A copy of the keys and values of a row's tokens that were read."""
        columns = slice(int(self.start[row]), self.length)
        return Cache(self.keys[:, row, :, columns].clone(), self.values[:, row, :, columns].clone())

    def _first(self, window: int | None) -> int:
        """The first column that the next token attends to."""
        return 0 if window is None else max(0, self.length + 1 - window)

    def _causal_mask(self, window: int | None) -> Tensor:
        """[prompts, 1, new * group, columns], True where a new token attends to an earlier one or itself."""
        column = self.columns[self._first(window) : self.width]
        distance = self.columns[self.length : self.width, None] - column
        seen = (distance >= 0) & (column >= self.start[:, None, None])
        if window is not None:
            seen &= distance < window
        # Padding attends to itself: attention to no token is NaN, which would spread.
        seen |= distance == 0
        return seen.unsqueeze(1).repeat_interleave(self.weights.heads // self.weights.key_heads, dim=2)

    def _forward(self, tokens: Tensor, masks: Masks) -> Tensor:
        """The logits after the last of the tokens [n, t], which fill the next t columns."""
        weights, (n, t), head_dim = self.weights, tokens.shape, self.weights.head_dim
        columns = slice(self.length, self.length + t)
        positions = (self.columns[columns] - self.start.unsqueeze(-1)).clamp(min=0)
        turn = self.rotations[positions.flatten()].unsqueeze(1)
        x = F.embedding(tokens.flatten(), weights.embedding)
        with torch.autocast(x.device.type, enabled=False):
            for layer, keys, values in zip(weights.layers, self.keys, self.values, strict=True):
                heads = layer.qkv(layer.attention_norm(x)).view(n * t, -1, head_dim)
                turned, value = heads.tensor_split([weights.heads + weights.key_heads], dim=1)
                if layer.head_norm is not None:
                    turned = layer.head_norm(turned)
                query, key = _rotate(turned, turn).to(weights.dtype).tensor_split([weights.heads], dim=1)
                keys[:n, :, columns] = key.view(n, t, -1, head_dim).transpose(1, 2)
                values[:n, :, columns] = value.view(n, t, -1, head_dim).transpose(1, 2)
                seen = (slice(n), slice(None), slice(self._first(layer.window), columns.stop))
                x += layer.out(
                    _attend(query, keys[seen], values[seen], masks[layer.window], scaling=weights.scaling)
                )
                gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
                x += layer.down(layer.activation(gate) * up)
            self.length = columns.stop
            return weights.head(weights.norm(x.view(n, t, -1)[:, -1])).float()


def _rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """Rotate heads [.., head_dim] whose pairs are neighbours."""
    pairs = torch.view_as_complex(heads.float().view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scaling: float) -> Tensor:
    """Attend from queries [n * t, heads, d] to keys and values [n, key heads, columns, d].

    Query heads that share a key are treated like further tokens, so that no key is repeated.
    Returns [n * t, heads * d].
    """
    (n, key_heads, _, head_dim), (rows, heads, _) = keys.shape, query.shape
    query = query.view(n, rows // n, key_heads, heads // key_heads, head_dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        query.flatten(2, 3), keys, values, attn_mask=mask, scale=scaling
    )
    return attended.view(n, key_heads, *query.shape[2:4], head_dim).transpose(1, 2).reshape(rows, -1)
