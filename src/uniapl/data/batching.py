"""Mixing: rows of both kinds -> micro-batches with one mask per component, and their global counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from uniapl.types import Example, MicroBatch, Span, TokenIds


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of a step before padding: what it holds and which components learn from it."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    components: frozenset[str]
    """Out of "sft", "rl", "adv", "kl"."""
    advantage: float = 0.0
    adversarial_advantage: float = 0.0
    temperature: float = 1.0
    sampling_logprobs: tuple[float, ...] | None = None
    """None marks a demonstration."""

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def has_gradient(self, weights: Mapping[str, float]) -> bool:
        """Whether anything asks for its log-probabilities: an advantage of 0 gives no gradient."""
        credit = {"rl": self.advantage, "adv": self.adversarial_advantage}
        return any(weights[name] and credit.get(name, 1.0) for name in self.components)


def demonstration_row(example: Example) -> Row:
    """The row of an example's demonstration."""
    assert example.demonstration_ids is not None
    return Row(
        prompt_ids=example.prompt_ids,
        completion_ids=example.demonstration_ids,
        components=frozenset({"sft"}),
    )


def component_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens per component over all rows: with the rows of the whole step, the global counts."""
    return {
        name: sum(len(row.completion_ids) for row in rows if name in row.components)
        for name in ("sft", "rl", "adv", "kl")
    }


def by_length(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Indices of sequences in batches of like length, the longest first and equals in their order.

    A batch, padded to its longest, holds at most `max_tokens` (or one sequence) and `max_rows`.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        current = batches[-1] if batches else None
        if (
            current is None
            or (len(current) + 1) * lengths[current[0]] > max_tokens
            or (max_rows is not None and len(current) >= max_rows)
        ):
            batches.append([index])
        else:
            current.append(index)
    return batches


def by_prompt(
    sequences: Sequence[tuple[TokenIds, TokenIds]], *, max_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """Indices of (prompt, completion) in batches in which a prompt counts once, the longest prompts' first.

    The completions of a prompt stay together where they fit. A batch holds at most `max_tokens` (or one
    sequence) and `max_rows`.
    """
    groups: dict[TokenIds, list[int]] = {}
    for index, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt, []).append(index)

    def tokens(part: list[int]) -> int:
        return len(sequences[part[0]][0]) + sum(len(sequences[index][1]) for index in part)

    def fits(tokens: int, rows: int) -> bool:
        return tokens <= max_tokens and (max_rows is None or rows <= max_rows)

    parts: list[list[int]] = []
    for group in sorted(groups.values(), key=tokens, reverse=True):
        parts.append([])
        for index in group:
            if parts[-1] and not fits(tokens([*parts[-1], index]), len(parts[-1]) + 1):
                parts.append([])
            parts[-1].append(index)
    batches: list[list[int]] = []
    taken = 0
    for part in parts:
        if not batches or not fits(taken + tokens(part), len(batches[-1]) + len(part)):
            batches.append([])
            taken = 0
        batches[-1] += part
        taken += tokens(part)
    return batches


def shares(rows: Sequence[Row], number: int) -> list[list[Row]]:
    """The rows dealt to `number` processes, a prompt's rows to the same one, about as many tokens to each."""
    groups: dict[TokenIds, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt_ids, []).append(row)
    dealt: list[list[Row]] = [[] for _ in range(number)]
    loads = [0] * number
    for group in sorted(groups.values(), key=lambda group: sum(row.length for row in group), reverse=True):
        poorest = loads.index(min(loads))
        dealt[poorest] += group
        loads[poorest] += len(group[0].prompt_ids) + sum(len(row.completion_ids) for row in group)
    return dealt


def spans_of(
    sequences: Sequence[tuple[TokenIds, TokenIds]], starts: Sequence[int] | None = None
) -> tuple[Span, ...]:
    """Where padded (prompt, completion) lie; `starts`: the padding before each, by default none."""
    numbers: dict[TokenIds, int] = {}
    return tuple(
        Span(
            start=start,
            prompt_length=len(prompt),
            length=len(prompt) + len(completion),
            prompt=numbers.setdefault(prompt, len(numbers)),
        )
        for (prompt, completion), start in zip(sequences, starts or [0] * len(sequences), strict=True)
    )


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T] of the rows."""
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return input_ids, attention_mask


def micro_batches(
    rows: Sequence[Row],
    *,
    pad_id: int,
    max_tokens: int,
    max_rows: int | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """Cut rows into micro-batches of at most `max_tokens` tokens (or one row) and `max_rows` rows.

    Packed, rows of a prompt share one, and it counts once; else rows of like length do, and padding counts.
    Their kind does not matter. Without rows, one empty micro-batch is returned.
    """
    if packed:
        sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
        parts = by_prompt(sequences, max_tokens=max_tokens, max_rows=max_rows)
    else:
        parts = by_length([row.length for row in rows], max_tokens=max_tokens, max_rows=max_rows)
    batches = [
        collate([rows[i] for i in part], pad_id=pad_id, packed=packed, device=device) for part in parts
    ]
    return batches or [empty_micro_batch(pad_id, device=device)]


def empty_micro_batch(pad_id: int, *, device: torch.device | str = "cpu") -> MicroBatch:
    """A micro-batch without a loss: a backward pass to take part in, which fits in any memory."""
    row = Row(prompt_ids=(pad_id, pad_id), completion_ids=(), components=frozenset())
    return collate([row], pad_id=pad_id, device=device)


def halves(batch: MicroBatch) -> list[MicroBatch]:
    """The first and the second half of a micro-batch's rows; one row stays as it is."""
    rows = len(batch.input_ids)
    middle = (rows + 1) // 2
    return [
        MicroBatch(**{field.name: getattr(batch, field.name)[part] for field in fields(batch)})
        for part in (slice(0, middle), slice(middle, rows))
        if rows > part.start
    ]


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pad rows into one micro-batch; masks come from lengths, never from token ids.

    Args:
        packed: Say where the rows lie, so that the model can read them without the padding.
    """
    width = max(row.length for row in rows)
    starts = [width - row.length if padding_side == "left" else 0 for row in rows]

    def padded(values: Sequence[Sequence[int] | Sequence[float]], fill: int, dtype: torch.dtype) -> Tensor:
        out = torch.full((len(rows), width), fill, dtype=dtype)
        for number, (value, start) in enumerate(zip(values, starts, strict=True)):
            out[number, start : start + len(value)] = torch.tensor(value, dtype=dtype)
        return out.to(device)

    def completion_mask(*wanted: bool) -> Tensor:
        spans = [
            [False] * len(row.prompt_ids) + [use] * len(row.completion_ids)
            for row, use in zip(rows, wanted, strict=True)
        ]
        return padded(spans, False, torch.bool)

    def mask(component: str) -> Tensor:
        return completion_mask(*(component in row.components for row in rows))

    def per_row(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    attention_mask = padded([[True] * row.length for row in rows], False, torch.bool)
    return MicroBatch(
        input_ids=padded([row.prompt_ids + row.completion_ids for row in rows], pad_id, torch.int64),
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        sft_mask=mask("sft"),
        rl_mask=mask("rl"),
        adv_mask=mask("adv"),
        rollout_mask=completion_mask(*(row.sampling_logprobs is not None for row in rows)),
        advantages=per_row([row.advantage for row in rows]),
        adversarial_advantages=per_row([row.adversarial_advantage for row in rows]),
        temperature=per_row([row.temperature for row in rows]),
        sampling_logprobs=padded(
            [
                [0.0] * len(row.prompt_ids) + list(row.sampling_logprobs or [0.0] * len(row.completion_ids))
                for row in rows
            ],
            0,
            torch.float32,
        ),
        spans=spans_of([(row.prompt_ids, row.completion_ids) for row in rows], starts) if packed else (),
    )
