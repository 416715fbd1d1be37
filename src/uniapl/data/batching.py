"""Micro-batches of demonstrations and rollouts, with one mask and one token count per loss component."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uniapl.types import (
    Example,
    Given,
    MicroBatch,
    Span,
    TokenIds,
    Tokens,
    packed_tokens,
)
from uniapl.untyped import items_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of a step before padding, and the loss components that it enters."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    components: frozenset[str]
    """A subset of "sft", "rl", "adv", "kl", "pref". The tokens of "kl" also enter the entropy bonus and the
    KL to the teacher."""
    advantage: float = 0.0
    adversarial_advantage: float = 0.0
    temperature: float = 1.0
    sampling_logprobs: tuple[float, ...] | None = None
    """Nats, one per written token of the completion; None for a demonstration."""
    ref_logprobs: tuple[float, ...] | None = None
    """As `sampling_logprobs`, under the KL reference; None without one."""
    chosen: "Row | None" = None
    """The completion of the same prompt that is preferred to this one, for "pref". It is a part of the row,
    so that a pair is never separated: each micro-batch has the chosen completions of its rows."""
    given: Given = ()

    @property
    def tokens(self) -> Tokens:
        """Prompt and completion."""
        return Tokens(self.prompt_ids, self.completion_ids, self.given)

    @property
    def num_written(self) -> int:
        """Number of completion tokens that enter the loss components."""
        return self.tokens.num_written

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
        Row(prompt_ids=prompt, completion_ids=completion, given=given, components=frozenset({"sft"}))
        for prompt, completion, given in example.demonstrated_turns
    ]


def component_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens per component over `rows`; for all rows of a step, these are the global counts N."""
    return {
        name: sum(row.num_written for row in rows if name in row.components)
        for name in ("sft", "rl", "adv", "kl")
    }


def completion_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Completions per component over `rows`."""
    names = ("sft", "rl", "adv", "kl", "pref")
    return {name: sum(name in row.components for row in rows) for name in names}


def chosen_rows(rows: Iterable[Row]) -> list[Row]:
    """The chosen completions of the rows' pairs, each once."""
    return [*dict.fromkeys(row.chosen for row in rows if row.chosen is not None)]


def batch_by_length(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_rows: int | None = None,
    counts: Sequence[int] | None = None,
) -> list[list[int]]:
    """Group the indices of sequences into batches of similar length, longest first.

    A batch has at most `max_tokens` tokens, padding included (or one sequence), and at most `max_rows` rows.

    Args:
        counts: Rows that each index stands for; by default 1.
    """
    counts = counts or [1] * len(lengths)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        rows = sum(counts[other] for other in (*batches[-1], index)) if batches else 0
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
    chosen: Sequence[TokenIds | None] | None = None,
) -> list[list[int]]:
    """Group the indices of (prompt, completion) pairs into batches.

    Padded batches are those of `batch_by_length`. In a packed batch a prompt counts once and there is no
    padding; the completions of one prompt stay in one batch if they fit.

    Args:
        chosen: The completion that each one brings into its batch (`Row.chosen`), or None. In a packed batch
            the completions that share it bring it once; a padded batch has room for one with each.
    """
    spans = spans_of(sequences)
    chosen = chosen or [None] * len(spans)
    counts = [1 + (ids is not None) for ids in chosen]
    if not packed:
        lengths = [
            max(span.length, span.prompt_length + len(ids or ()))
            for span, ids in zip(spans, chosen, strict=True)
        ]
        return batch_by_length(lengths, max_tokens=max_tokens, max_rows=max_rows, counts=counts)
    groups: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        groups.setdefault(span.prompt, []).append(index)

    limits = {"max_tokens": max_tokens, "max_rows": max_rows or sum(counts)}

    def brought(batch: list[int]) -> int:
        return sum(len(ids or ()) for _, ids in {(spans[index].prompt, chosen[index]) for index in batch})

    def tokens(batch: list[int]) -> int:
        return packed_tokens([spans[index] for index in batch]) + brought(batch)

    parts: list[tuple[list[int], int]] = []
    for group in sorted(groups.values(), key=tokens, reverse=True):
        prompt_length = spans[group[0]].prompt_length
        completions = [([index], spans[index].length - prompt_length) for index in group]
        shared = prompt_length + brought(group)
        parts += [(part, tokens(part)) for part in _join(completions, counts, shared=shared, **limits)]
    return _join(parts, counts, shared=0, **limits)


def _join(
    parts: Iterable[tuple[list[int], int]],
    counts: Sequence[int],
    *,
    shared: int,
    max_tokens: int,
    max_rows: int,
) -> list[list[int]]:
    """Concatenate consecutive (indices, tokens) while they fit; `shared` tokens count once per result."""
    joined: list[list[int]] = []
    taken = 0
    for part, tokens in parts:
        rows = sum(counts[index] for index in (*joined[-1], *part)) if joined else 0
        if joined and taken + tokens <= max_tokens and rows <= max_rows:
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
        completions = [*group, *chosen_rows(group)]
        loads[smallest] += len(group[0].prompt_ids) + sum(len(row.completion_ids) for row in completions)
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


def batch_rows(
    rows: Sequence[Row], *, max_tokens: int, max_rows: int | None, packed: bool
) -> list[list[Row]]:
    """Group rows into batches (see `batch_sequences`), with room for their chosen completions."""
    parts = batch_sequences(
        [(row.prompt_ids, row.completion_ids) for row in rows],
        max_tokens=max_tokens,
        max_rows=max_rows,
        packed=packed,
        chosen=[row.chosen and row.chosen.completion_ids for row in rows],
    )
    return [[rows[index] for index in part] for part in parts]


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
    parts = batch_rows(rows, max_tokens=max_tokens, max_rows=max_rows, packed=packed)
    batches = [collate(part, pad_id=pad_id, packed=packed, device=device) for part in parts]
    return batches or [empty_micro_batch(pad_id, device=device)]


def empty_micro_batch(pad_id: int, *, device: torch.device | str = "cpu") -> MicroBatch:
    """A micro-batch of two tokens without a loss, for a backward pass in step with the other processes."""
    row = Row(prompt_ids=(pad_id, pad_id), completion_ids=(), components=frozenset())
    return collate([row], pad_id=pad_id, device=device)


def halves(batch: MicroBatch) -> list[MicroBatch]:
    """Split a micro-batch into its first and second half of rows; a single row, or a single pair, is returned
    unchanged."""
    return [_of_rows(batch, part) for part in rows_of_halves(batch)]


def rows_of_halves(batch: MicroBatch) -> list[list[int]]:
    """The rows that each half of a micro-batch has; both have the chosen completions of their pairs."""
    chosen = items_of(batch.chosen)
    own = [row for row in range(len(chosen)) if row not in chosen]
    middle = (len(own) + 1) // 2
    parts = (own[:middle], own[middle:])
    return [[*part, *sorted({chosen[row] for row in part} - {-1})] for part in parts if part]


def _of_rows(batch: MicroBatch, rows: list[int]) -> MicroBatch:
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {row: number for number, row in enumerate(rows)}
    chosen = [numbers.get(row, -1) for row in items_of(tensors["chosen"])]
    tensors["chosen"] = torch.tensor(chosen, device=batch.chosen.device)
    return replace(batch, **tensors, spans=tuple(batch.spans[row] for row in rows) if batch.spans else ())


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pad rows into one micro-batch, followed by the chosen completions of their pairs.

    Masks depend on lengths, never on token ids. `packed` adds the spans, with which the model reads the rows
    packed.
    """
    numbers = {row: number for number, row in enumerate(chosen_rows(rows), start=len(rows))}
    rows = [*rows, *numbers]

    def padded(values: Iterable[Sequence[float]], fill: int, dtype: torch.dtype) -> Tensor:
        tensors = [torch.tensor(value, dtype=dtype) for value in values]
        padded = pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=padding_side)
        return padded.to(device)

    def per_row(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    def per_token(values: Iterable[Sequence[float] | None]) -> Tensor:
        """0 for prompts, for tokens that were given, and in rows without values."""
        filled: list[list[float]] = []
        for value, row, mask in zip(values, rows, written, strict=True):
            left = iter(value or (0.0,) * row.num_written)
            filled.append([0.0] * len(row.prompt_ids) + [next(left) if own else 0.0 for own in mask])
            assert next(left, None) is None, "one value per written token"
        return padded(filled, 0, torch.float32)

    def mask(selected: Iterable[bool]) -> Tensor:
        return in_completion & per_row(selected, torch.bool).unsqueeze(-1)

    sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
    written = [row.tokens.is_written for row in rows]
    in_completion = padded(
        ([False] * len(row.prompt_ids) + mask for row, mask in zip(rows, written, strict=True)), 0, torch.bool
    )
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
        pref_mask=mask("pref" in row.components for row in rows),
        chosen=per_row((-1 if row.chosen is None else numbers[row.chosen] for row in rows), torch.int64),
        advantages=per_row(row.advantage for row in rows),
        adversarial_advantages=per_row(row.adversarial_advantage for row in rows),
        temperature=per_row(row.temperature for row in rows),
        sampling_logprobs=per_token(row.sampling_logprobs for row in rows),
        ref_logprobs=per_token(row.ref_logprobs for row in rows),
        spans=spans_of(sequences, starts) if packed else (),
    )
