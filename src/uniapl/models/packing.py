"""Packed rows: no padding, each prompt once, and attention that keeps the rows separate.

Two padded rows with the same prompt `5 9` (0 is padding), and the slots of their tokens when packed:

    5 9 31 1  0         0 1 2 3 .
    5 9 44 45 1         0 1 4 5 6

All token-wise layers of the model run on the packed sequence. In the attention layers a prompt attends to
itself, and a completion to its prompt and itself. Source: our choice; the idea is Prefix Grouper's
(arXiv 2506.05433).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import sdpa_attention

from uniapl.types import Span

NAME = "uniapl_packed"
SIMILAR_LENGTH = 0.6
"""Segments shorter than this fraction of the longest one attend in a separate call (our choice)."""
PADDED_KEY = 2**30
"""The position of a padded key: behind every query, so that no query attends to it."""


class Segment(NamedTuple):
    """A prompt or a completion: consecutive slots that attend to themselves and to a prefix."""

    start: int
    length: int
    prefix_start: int = 0
    """The first slot of a completion's prompt."""
    prefix_length: int = 0


@dataclass(frozen=True, kw_only=True)
class Block:
    """R segments that attend in one call, padded on the right to Q queries and K keys."""

    queries: Tensor
    """[R, Q]: slots, 0 for padding."""
    is_query: Tensor
    """[R, Q]: False for padding."""
    query_positions: Tensor
    """[R, Q]: positions in the row, prompt included."""
    keys: Tensor
    """[R, K]: slots, 0 for padding."""
    key_positions: Tensor
    """[R, K]: positions in the row, PADDED_KEY for padding."""

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> "Block":
        """The block of one or more segments."""
        starts, lengths, prefix_starts, prefix_lengths = torch.tensor(segments).unsqueeze(-1).unbind(1)
        queries, index, is_query = _slots(starts, lengths)
        prefix, prefix_index, in_prefix = _slots(prefix_starts, prefix_lengths)
        positions = prefix_lengths + index
        is_key = torch.cat([in_prefix, is_query], dim=1)
        key_positions = torch.where(is_key, torch.cat([prefix_index, positions], dim=1), PADDED_KEY)
        return Block(
            queries=queries.to(device),
            is_query=is_query.to(device),
            query_positions=positions.to(device),
            keys=torch.cat([prefix, queries], dim=1).to(device),
            key_positions=key_positions.to(device),
        )

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The term added to the attention scores, [R, 1, Q, K]; None where plain causal attention is enough.

        `window` is the number of tokens that a query attends to, itself included; None means all before it.
        """
        if self.queries.shape == self.keys.shape and window is None:
            return None
        query, key = self.query_positions.unsqueeze(-1), self.key_positions.unsqueeze(1)
        hidden = key > query
        if window is not None:
            hidden |= query - key >= window
        # A padded query attends to one key: if all are -inf, some kernels return NaN, also in gradients.
        hidden[..., 0] &= self.is_query
        added = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return added.masked_fill_(hidden, float("-inf")).unsqueeze(1)


class Packing:
    """How padded rows [B, T] become one sequence of N tokens, and which tokens attend to which."""

    def __init__(self, spans: Sequence[Span], width: int, device: torch.device) -> None:
        """`spans` has one entry per row; `width` is T."""
        tokens: list[int] = []
        slots = torch.zeros(len(spans), width, dtype=torch.int64)
        prompts: dict[int, Segment] = {}
        completions: list[Segment] = []

        def append(row: int, start: int, length: int) -> int:
            tokens.extend(range(row * width + start, row * width + start + length))
            return len(tokens) - length

        for row, span in enumerate(spans):
            length = span.prompt_length
            if span.prompt not in prompts:
                prompts[span.prompt] = Segment(append(row, span.start, length), length)
            slots[row, span.start : span.start + length] = torch.arange(length) + prompts[span.prompt].start
        for row, span in enumerate(spans):
            start, length = span.start + span.prompt_length, span.length - span.prompt_length
            if length:
                segment = Segment(append(row, start, length), length, *prompts[span.prompt][:2])
                slots[row, start : start + length] = torch.arange(length) + segment.start
                completions.append(segment)
        self.tokens = torch.tensor(tokens, device=device)
        """[N]: the index of each slot's token in the flattened rows."""
        self.slots = slots.to(device)
        """[B, T]: the slot of each token; 0 for padding."""
        parts = [*_similar_segments(prompts.values()), *_similar_segments(completions)]
        self.blocks = [Block.of(part, device) for part in parts]
        queries = torch.cat([block.queries[block.is_query] for block in self.blocks])
        places = torch.cat([block.is_query.flatten() for block in self.blocks]).nonzero().squeeze(-1)
        self.outputs = torch.empty_like(places).scatter_(0, queries, places)
        """[N]: the index of each slot among the padded queries of all blocks."""
        self.known_masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = {}

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """The mask of each block, computed once for all layers."""
        key = (window, dtype)
        if key not in self.known_masks:
            self.known_masks[key] = [block.mask(window, dtype) for block in self.blocks]
        return self.known_masks[key]


def packed_hidden(trunk: nn.Module, input_ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
    """Last hidden states [N, D], one per slot, of padded rows [B, T]."""
    output = trunk(
        input_ids=input_ids.flatten()[packing.tokens].unsqueeze(0),
        position_ids=position_ids.flatten()[packing.tokens].unsqueeze(0),
        # transformers passes on a mask of four dimensions unchanged, and `attend` ignores it.
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
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: block by block with a packing, plain sdpa without one.

    Args:
        query: [1, H, N, D]; `key` and `value` may have fewer heads.

    Returns:
        [1, N, H, D].
    """
    if packing is None:
        options["sliding_window"] = sliding_window
        sdpa = cast("Any", sdpa_attention).sdpa_attention_forward
        return sdpa(module, query, key, value, attention_mask, **options)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("packed attention supports neither soft caps nor attention sinks")
    # [N, H, D]: one gather per block fetches all heads of a token.
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs: list[Tensor] = []
    for block, mask in zip(packing.blocks, packing.masks(sliding_window, query.dtype), strict=True):
        keys, values = _gather(key, block.keys), _gather(value, block.keys)
        # CUDA's fast kernels need as many heads of keys as of queries if there is a mask.
        grouped = mask is None or query.device.type == "cpu"
        if not grouped:
            repeats = query.shape[1] // key.shape[1]
            keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
        attended = nn.functional.scaled_dot_product_attention(
            _gather(query, block.queries),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.get("scaling"),
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.outputs).unsqueeze(0), None


cast("Any", AttentionInterface).register(NAME, attend)
# Without a packing, the masks are those of sdpa.
cast("Any", AttentionMaskInterface).register(NAME, cast("Any", masking_utils).sdpa_mask)


def can_pack(trunk: nn.Module) -> bool:
    """Switch a model's trunk to packed attention if its hidden states are then the same as for padded rows.

    The model must use transformers' sdpa attention and mix tokens in no other way; a probe checks this.
    If it does not, the model is left unchanged and False is returned.
    """
    config: Any = trunk.config
    before = config._attn_implementation
    if before not in ("sdpa", NAME):
        return False
    config._attn_implementation = NAME
    try:
        able = _packed_equals_padded(trunk)
    except Exception:  # a model that raises on packed rows cannot be packed
        able = False
    if not able:
        config._attn_implementation = before
    return able


@torch.no_grad()
def _packed_equals_padded(trunk: Any) -> bool:
    """Compare hidden states of three completions of two prompts."""
    config = trunk.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return False
    embeddings = trunk.get_input_embeddings().weight
    spans = [Span(0, 3, 9, 0), Span(0, 3, 5, 0), Span(0, 5, 10, 1)]
    rows = torch.arange(3, device=embeddings.device).unsqueeze(-1)
    index = torch.arange(10, device=embeddings.device).expand(3, -1)
    real = index < torch.tensor([[span.length] for span in spans], device=embeddings.device)
    input_ids = torch.where(index < 3, index, index + 7 * rows) % len(embeddings)
    packing = Packing(spans, 10, embeddings.device)
    packed = packed_hidden(trunk, input_ids, index, packing)[packing.slots[real]]
    if hasattr(config, "layer_types"):
        slides = "sliding_attention" in kinds
    else:
        slides = bool(getattr(config, "sliding_window", None))
    if slides and {window for window, _ in packing.known_masks} == {None}:
        # The window was not passed to `attend`, and the probe is too short to show the difference.
        return False
    padded = trunk(input_ids=input_ids, attention_mask=real.long(), position_ids=index, use_cache=False)
    padded = padded.last_hidden_state[real]
    tolerance = 2e-2 if torch.is_autocast_enabled(padded.device.type) else 1e-4
    return bool((packed - padded).abs().max() <= tolerance * padded.abs().max())


def _similar_segments(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Group segments of similar length, so that the longest does not add much padding to the others."""
    for part in _group_by_length(segments, lambda segment: segment.length):
        yield from _group_by_length(
            part, lambda segment, longest=part[0].length: segment.prefix_length + longest
        )


def _group_by_length(segments: Iterable[Segment], length: Callable[[Segment], int]) -> list[list[Segment]]:
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=length, reverse=True):
        if not groups or length(segment) < SIMILAR_LENGTH * length(groups[-1][0]):
            groups.append([])
        groups[-1].append(segment)
    return groups


def _slots(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slots of segments, their indices in the segment, and False for padding; each [R, longest]."""
    index = torch.arange(int(lengths.max())).expand(len(lengths), -1)
    real = index < lengths
    return torch.where(real, index + starts, 0), index, real


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    """[N, H, D] -> [R, H, W, D] at slots [R, W]."""
    flat = states.reshape(len(states), -1).index_select(0, slots.flatten())
    return flat.view(*slots.shape, *states.shape[1:]).transpose(1, 2)
