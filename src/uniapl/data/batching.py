"""Micro-batches of demonstrations and rollouts, with one mask and one token count per loss component."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uniapl.types import Example, MicroBatch, Span, TokenIds, packed_tokens


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of a step before padding, and the loss components that it enters."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    components: frozenset[str]
    """A subset of "sft", "rl", "adv", "kl". The tokens of "kl" also enter the entropy bonus and the KL to the
    teacher."""
    advantage: float = 0.0
    adversarial_advantage: float = 0.0
    temperature: float = 1.0
    sampling_logprobs: tuple[float, ...] | None = None
    """Nats, one per completion token; None for a demonstration."""
    ref_logprobs: tuple[float, ...] | None = None
    """As `sampling_logprobs`, under the KL reference; None without a KL term."""

    @property
    def length(self) -> int:
        """Number of tokens without padding."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def has_gradient(self, weights: Mapping[str, float]) -> bool:
        """Whether a component with a weight gives the row a gradient; an advantage of 0 gives none."""
        advantages = {"rl": self.advantage, "adv": self.adversarial_advantage}
        others = weights.get("entropy") or weights.get("teacher")
        return bool(others and "kl" in self.components) or any(
            weights[name] and advantages.get(name, 1.0) for name in self.components
        )


def demonstration_rows(example: Example) -> list[Row]:
    """One row per demonstrated turn. Rows of rollouts: `training.update.credit.rollout_rows`."""
    return [
        Row(prompt_ids=prompt, completion_ids=completion, components=frozenset({"sft"}))
        for prompt, completion in example.demonstrated_turns
    ]


def component_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens per component over `rows`; for all rows of a step, these are the global counts N."""
    return {
        name: sum(len(row.completion_ids) for row in rows if name in row.components)
        for name in ("sft", "rl", "adv", "kl")
    }


def completion_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Completions per component over `rows`."""
    return {name: sum(name in row.components for row in rows) for name in ("sft", "rl", "adv", "kl")}


def batch_by_length(
    lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """Group the indices of sequences into batches of similar length, longest first.

    A batch has at most `max_tokens` tokens, padding included (or one sequence), and at most `max_rows` rows.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        rows = len(batches[-1]) + 1 if batches else 0
        if rows and rows <= (max_rows or rows) and rows * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def batch_sequences(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_tokens: int,
    max_rows: int | None = None,
    packed: bool,
) -> list[list[int]]:
    """Group the indices of (prompt, completion) pairs into batches.

    Padded batches are those of `batch_by_length`. In a packed batch a prompt counts once and there is no
    padding; the completions of one prompt stay in one batch if they fit.
    """
    spans = spans_of(sequences)
    if not packed:
        return batch_by_length([span.length for span in spans], max_tokens=max_tokens, max_rows=max_rows)
    groups: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        groups.setdefault(span.prompt, []).append(index)

    limits = {"max_tokens": max_tokens, "max_rows": max_rows or len(spans)}

    def tokens(batch: list[int]) -> int:
        return packed_tokens([spans[index] for index in batch])

    parts: list[tuple[list[int], int]] = []
    for group in sorted(groups.values(), key=tokens, reverse=True):
        prompt_length = spans[group[0]].prompt_length
        completions = [([index], spans[index].length - prompt_length) for index in group]
        parts += [(part, tokens(part)) for part in _join(completions, shared=prompt_length, **limits)]
    return _join(parts, shared=0, **limits)


def _join(
    parts: Iterable[tuple[list[int], int]], *, shared: int, max_tokens: int, max_rows: int
) -> list[list[int]]:
    """Concatenate consecutive (indices, tokens) while they fit; `shared` tokens count once per result."""
    joined: list[list[int]] = []
    taken = 0
    for part, tokens in parts:
        if joined and taken + tokens <= max_tokens and len(joined[-1]) + len(part) <= max_rows:
            joined[-1] += part
            taken += tokens
        else:
            joined.append([*part])
            taken = shared + tokens
    return joined


def shards(rows: Sequence[Row], number: int) -> list[list[Row]]:
    """Distribute rows over processes: those of a prompt to the same one, similar token counts to each."""
    groups: dict[TokenIds, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt_ids, []).append(row)
    dealt: list[list[Row]] = [[] for _ in range(number)]
    loads = [0] * number
    for group in sorted(groups.values(), key=lambda group: sum(row.length for row in group), reverse=True):
        smallest = loads.index(min(loads))
        dealt[smallest] += group
        loads[smallest] += len(group[0].prompt_ids) + sum(len(row.completion_ids) for row in group)
    return dealt


def spans_of(
    sequences: Sequence[tuple[TokenIds, TokenIds]], starts: Sequence[int] | None = None
) -> tuple[Span, ...]:
    """The spans of padded (prompt, completion) pairs; `starts` is the padding before each, by default 0."""
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
    ids = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return input_ids.to(device), attention_mask.to(device)


def micro_batches(
    rows: Sequence[Row],
    *,
    pad_id: int,
    max_tokens: int,
    max_rows: int | None = None,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """Split rows into micro-batches (see `batch_sequences`). Without rows, return one empty micro-batch."""
    sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
    batches = [
        collate([rows[index] for index in part], pad_id=pad_id, packed=packed, device=device)
        for part in batch_sequences(sequences, max_tokens=max_tokens, max_rows=max_rows, packed=packed)
    ]
    return batches or [empty_micro_batch(pad_id, device=device)]


def empty_micro_batch(pad_id: int, *, device: torch.device | str = "cpu") -> MicroBatch:
    """A micro-batch of two tokens without a loss, for a backward pass in step with the other processes."""
    row = Row(prompt_ids=(pad_id, pad_id), completion_ids=(), components=frozenset())
    return collate([row], pad_id=pad_id, device=device)


def halves(batch: MicroBatch) -> list[MicroBatch]:
    """Split a micro-batch into its first and second half of rows; a single row is returned unchanged."""
    rows = len(batch.input_ids)
    middle = (rows + 1) // 2
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}

    def of(part: slice) -> dict[str, Any]:
        return {name: value if value is None else value[part] for name, value in values.items()}

    parts = (slice(0, middle), slice(middle, rows))
    return [MicroBatch(**of(part)) for part in parts if rows > part.start]


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pad rows into one micro-batch. Masks depend on lengths, never on token ids.

    `packed` adds the spans, with which the model reads the rows packed.
    """

    def padded(values: Iterable[Sequence[float]], fill: int, dtype: torch.dtype) -> Tensor:
        tensors = [torch.tensor(value, dtype=dtype) for value in values]
        padded = pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=padding_side)
        return padded.to(device)

    def per_row(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    def per_token(values: Iterable[Sequence[float] | None]) -> Tensor:
        filled = (
            (0.0,) * len(prompt) + tuple(value or (0.0,) * len(ids))
            for value, (prompt, ids) in zip(values, sequences, strict=True)
        )
        return padded(filled, 0, torch.float32)

    def mask(selected: Iterable[bool]) -> Tensor:
        return in_completion & per_row(selected, torch.bool).unsqueeze(-1)

    sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
    in_completion = padded(([0] * len(prompt) + [1] * len(ids) for prompt, ids in sequences), 0, torch.bool)
    attention_mask = padded(([1] * row.length for row in rows), 0, torch.bool)
    width = attention_mask.shape[1]
    starts = [width - row.length if padding_side == "left" else 0 for row in rows]
    return MicroBatch(
        input_ids=padded((prompt + ids for prompt, ids in sequences), pad_id, torch.int64),
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        sft_mask=mask("sft" in row.components for row in rows),
        rl_mask=mask("rl" in row.components for row in rows),
        adv_mask=mask("adv" in row.components for row in rows),
        rollout_mask=mask("kl" in row.components for row in rows),
        advantages=per_row(row.advantage for row in rows),
        adversarial_advantages=per_row(row.adversarial_advantage for row in rows),
        temperature=per_row(row.temperature for row in rows),
        sampling_logprobs=per_token(row.sampling_logprobs for row in rows),
        ref_logprobs=per_token(row.ref_logprobs for row in rows),
        spans=spans_of(sequences, starts) if packed else (),
    )
