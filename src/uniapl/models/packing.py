"""Rows without padding, each prompt once: one sequence, and the attention that keeps its rows apart.

Two padded rows with the same prompt `5 9`, and the slots of their tokens in the sequence (0 pads):

    5 9 31 1  0         0 1 2 3 .
    5 9 44 45 1         0 1 4 5 6

What a model does token by token runs on the sequence. Attention alone looks at rows: a prompt attends to
itself, a completion to its prompt and itself. Source: our choice; the idea is Prefix Grouper's
(arXiv 2506.05433).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from uniapl.types import Span

NAME = "uniapl_packed"
ALIKE = 0.6
"""Prompts and completions below this share of the longest beside them attend in a call of their own (our
choice)."""
NOWHERE = 2**30
"""The position of a padded key: behind every query."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows that attend in one call, padded on the right to the longest."""

    queries: Tensor
    """[R, Q]: slots, 0 for padding."""
    is_query: Tensor
    """[R, Q]: False for padding."""
    query_positions: Tensor
    """[R, Q]: in the row, prompt included."""
    keys: Tensor
    """[R, K]: slots, 0 for padding."""
    key_positions: Tensor
    """[R, K]: NOWHERE for padding."""

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, [R, 1, Q, K]; None: queries and keys are the same, causal is enough.

        `window`: how many tokens a query sees, itself included; None: all before it.
        """
        if self.queries is self.keys and window is None:
            return None
        query, key = self.query_positions.unsqueeze(-1), self.key_positions.unsqueeze(1)
        hidden = key > query
        if window is not None:
            hidden |= query - key >= window
        # A padded query sees a key: some kernels make NaN of -inf alone, in the keys' gradients too.
        hidden[..., 0] &= self.is_query
        added = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return added.masked_fill_(hidden, float("-inf")).unsqueeze(1)


class Packing:
    """How padded rows become one sequence of N tokens, and what attends to what there."""

    def __init__(self, spans: Sequence[Span], width: int, device: torch.device) -> None:
        """Of rows padded to `width`."""
        tokens: list[int] = []
        slots = torch.zeros(len(spans), width, dtype=torch.int64)
        prompts: dict[int, int] = {}
        completions: list[int] = []

        def add(row: int, start: int, length: int) -> int:
            begin = len(tokens)
            tokens.extend(range(row * width + start, row * width + start + length))
            return begin

        for row, span in enumerate(spans):
            if span.prompt not in prompts:
                prompts[span.prompt] = add(row, span.start, span.prompt_length)
            place = slots[row, span.start : span.start + span.prompt_length]
            place[:] = torch.arange(span.prompt_length) + prompts[span.prompt]
        for row, span in enumerate(spans):
            middle, length = span.start + span.prompt_length, span.length - span.prompt_length
            completions.append(add(row, middle, length))
            slots[row, middle : middle + length] = torch.arange(length) + completions[row]
        self.tokens = torch.tensor(tokens, device=device)
        """[N]: where each slot's token lies in the flattened rows."""
        self.slots = slots.to(device)
        """[B, T]: the slot of each token; 0 for padding."""
        blocks = [*_prompt_blocks(spans, prompts), *_completion_blocks(spans, prompts, completions)]
        queries = torch.cat([block.queries[block.is_query] for block in blocks])
        places = torch.cat([block.is_query.flatten() for block in blocks]).nonzero().squeeze(-1)
        self.outputs = torch.empty_like(places).scatter_(0, queries, places).to(device)
        """[N]: where each slot stands among the queries of all blocks."""
        self.blocks = [_moved(block, device) for block in blocks]
        self.known_masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = {}

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """Of each block; all layers share them."""
        key = (window, dtype)
        if key not in self.known_masks:
            self.known_masks[key] = [block.mask(window, dtype) for block in self.blocks]
        return self.known_masks[key]


def packed_hidden(trunk: nn.Module, input_ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
    """Last hidden states [N, D] of padded rows [B, T], one per slot."""
    output = trunk(
        input_ids=input_ids.flatten()[packing.tokens].unsqueeze(0),
        position_ids=position_ids.flatten()[packing.tokens].unsqueeze(0),
        # A mask of four dimensions is taken as it is; `attend` does not look at it.
        attention_mask=input_ids.new_ones(1, 1, 1, 1),
        use_cache=False,
        packing=packing,
    )
    return output.last_hidden_state[0]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: sdpa's own without a packing, and block by block with one.

    Args:
        query: [1, H, N, D]; `key` and `value` may have fewer heads.

    Returns:
        [1, N, H, D].
    """
    if packing is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **options,
        )
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("packed attention has neither soft caps nor sinks")
    # [N, H x D]: one gather per block fetches all heads of a token.
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs: list[Tensor] = []
    for block, mask in zip(packing.blocks, packing.masks(sliding_window, query.dtype), strict=True):
        keys, values = _gather(key, block.keys), _gather(value, block.keys)
        # With a mask, CUDA's fast kernels want as many heads of keys as of queries.
        grouped = mask is None or query.device.type == "cpu"
        if not grouped:
            keys, values = (
                s.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for s in (keys, values)
            )
        attended = nn.functional.scaled_dot_product_attention(
            _gather(query, block.queries),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.outputs).unsqueeze(0), None


AttentionInterface.register(NAME, attend)
# Without a packing everything is as with sdpa.
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_pack(trunk: nn.Module) -> bool:
    """Make a model's trunk ready for packed rows; whether its hidden states are then those of padded rows.

    It has to attend by sdpa through transformers' interface, and to mix tokens in no other way. A model that
    does not is found out, and stays as it was.
    """
    config: Any = trunk.config
    before = config._attn_implementation
    if before not in ("sdpa", NAME):
        return False
    config._attn_implementation = NAME
    try:
        able = _agrees(trunk)
    except Exception:  # whatever a model stumbles over, it cannot
        able = False
    if not able:
        config._attn_implementation = before
    return able


@torch.no_grad()
def _agrees(trunk: Any) -> bool:
    """Three completions of two prompts, read padded and packed."""
    config = trunk.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return False
    embeddings = trunk.get_input_embeddings().weight
    spans = [Span(0, 3, 9, 0), Span(0, 3, 5, 0), Span(0, 5, 10, 1)]
    lengths = torch.tensor([span.length for span in spans], device=embeddings.device)
    index = torch.arange(10, device=embeddings.device).expand(3, -1)
    real = index < lengths.unsqueeze(-1)
    input_ids = torch.where(index < 3, index, index + 7 * torch.arange(3, device=index.device).unsqueeze(-1))
    input_ids = input_ids % len(embeddings)
    packing = Packing(spans, 10, embeddings.device)
    packed = packed_hidden(trunk, input_ids, index, packing)[packing.slots[real]]
    slides = (
        "sliding_attention" in kinds
        if hasattr(config, "layer_types")
        else getattr(config, "sliding_window", None)
    )
    if slides and {window for window, _ in packing.known_masks} == {None}:
        # Its windows are somewhere else; the probe is shorter than they are, and cannot tell.
        return False
    padded = trunk(input_ids=input_ids, attention_mask=real.long(), position_ids=index, use_cache=False)
    padded = padded.last_hidden_state[real]
    tolerance = 2e-2 if torch.is_autocast_enabled(padded.device.type) else 1e-4
    return bool((packed - padded).abs().max() <= tolerance * padded.abs().max())


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    """[N, H, D] -> [R, H, W, D] at slots [R, W]."""
    flat = states.reshape(len(states), -1).index_select(0, slots.flatten())
    return flat.view(*slots.shape, *states.shape[1:]).transpose(1, 2)


def _grid(starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of runs of consecutive slots, each index in its run, and which are real; all [R, longest]."""
    index = torch.arange(max(lengths)).expand(len(lengths), -1)
    real = index < torch.tensor(lengths).unsqueeze(-1)
    return torch.where(real, index + torch.tensor(starts).unsqueeze(-1), 0), index, real


def _alike(items: Iterable[int], lengths: Mapping[int, int]) -> list[list[int]]:
    """The items with those of like length, so that one long row does not widen all of them."""
    buckets: list[list[int]] = []
    for item in sorted(items, key=lambda item: lengths[item], reverse=True):
        if not buckets or lengths[item] < ALIKE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(item)
    return buckets


def _prompt_blocks(spans: Sequence[Span], prompts: dict[int, int]) -> list[Block]:
    lengths = {span.prompt: span.prompt_length for span in spans}
    blocks: list[Block] = []
    for bucket in _alike(prompts, lengths):
        slots, index, real = _grid(
            [prompts[number] for number in bucket], [lengths[number] for number in bucket]
        )
        positions = torch.where(real, index, NOWHERE)
        blocks.append(
            Block(queries=slots, is_query=real, query_positions=index, keys=slots, key_positions=positions)
        )
    return blocks


def _completion_blocks(
    spans: Sequence[Span], prompts: dict[int, int], completions: Sequence[int]
) -> list[Block]:
    """Rows together whose completions are alike, and what these attend to."""
    lengths = {row: span.length - span.prompt_length for row, span in enumerate(spans)}
    buckets: list[list[int]] = []
    for rows in _alike((row for row, length in lengths.items() if length), lengths):
        buckets += _alike(rows, {row: spans[row].prompt_length + lengths[rows[0]] for row in rows})
    blocks: list[Block] = []
    for rows in buckets:
        before = torch.tensor([spans[row].prompt_length for row in rows]).unsqueeze(-1)
        slots, index, real = _grid([completions[row] for row in rows], [lengths[row] for row in rows])
        prompt, prompt_index, prompt_real = _grid(
            [prompts[spans[row].prompt] for row in rows], [spans[row].prompt_length for row in rows]
        )
        positions = torch.cat([prompt_index, before + index], dim=1)
        blocks.append(
            Block(
                queries=slots,
                is_query=real,
                query_positions=before + index,
                keys=torch.cat([prompt, slots], dim=1),
                key_positions=torch.where(torch.cat([prompt_real, real], dim=1), positions, NOWHERE),
            )
        )
    return blocks


def _moved(block: Block, device: torch.device) -> Block:
    queries = block.queries.to(device)
    return Block(
        queries=queries,
        is_query=block.is_query.to(device),
        query_positions=block.query_positions.to(device),
        keys=queries if block.keys is block.queries else block.keys.to(device),
        key_positions=block.key_positions.to(device),
    )
