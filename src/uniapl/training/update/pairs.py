"""Preference pairs: a demonstration and a rollout of its prompt, or two completions of the data."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import Row
from uniapl.models.token_states import TokenStates
from uniapl.tolerance import at_least
from uniapl.training.update.credit import deciding_values
from uniapl.types import Example, RolloutGroup, TokenIds, Tokens

PREFERENCE = frozenset({"pref"})


def pair_rollouts(
    rows: Sequence[Row],
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    *,
    is_rewarded: Callable[[Example], bool],
    text_length: Callable[[TokenIds], int] = len,
) -> list[Row]:
    """The rows of the groups' rollouts, those that do not pass paired with their prompt's demonstration.

    A rollout that passes may be as good as the demonstration, and one whose reward function failed may pass:
    neither is rejected. Every rollout of a prompt without a reward is, as in SPIN. A rollout that equals the
    demonstration has no pair, because its gradient would be 0, and neither has one that enters no loss.

    Args:
        rows: See `rollout_rows`.
        is_rewarded: Whether a reward function applies to a prompt.
        text_length: Number of tokens before what closes a completion. Two that differ in nothing else are
            equal.
    """
    left = iter(rows)
    paired: list[Row] = []
    for group in groups:
        own = [next(left) for _ in group.rollouts]
        ids, rewarded = group.example.demonstration_ids, is_rewarded(group.example)
        if ids is None:
            paired += own
            continue
        demonstration = Row(
            prompt_ids=group.example.prompt_ids,
            completion_ids=ids,
            given=group.example.demonstration_given,
            components=PREFERENCE,
            temperature=own[0].temperature,
            ref_logprobs=group.demonstration_ref_logprobs,
        )
        for row, value in zip(own, deciding_values(group, objective), strict=True):
            fails = value is not None and not at_least(value, objective.pass_threshold)
            differs = row.completion_ids[: text_length(row.completion_ids)] != ids[: text_length(ids)]
            enters = (fails or not rewarded) and row.components and differs
            paired.append(_paired(row, demonstration) if enters else row)
    return paired


def pair_rejected(examples: Sequence[Example], *, temperature: float) -> list[Row]:
    """The rows of the rejected completions of the data, each paired with its demonstration."""
    rows: list[Row] = []
    for example in examples:
        if not example.is_pair:
            continue
        chosen, rejected = (
            Row(
                prompt_ids=example.prompt_ids,
                completion_ids=ids or (),
                given=given,
                components=PREFERENCE,
                temperature=temperature,
            )
            for ids, given in (
                (example.demonstration_ids, example.demonstration_given),
                (example.rejected_ids, ()),
            )
        )
        rows.append(_paired(rejected, chosen))
    return rows


def with_reference(
    rows: Sequence[Row], read: Callable[[Sequence[Tokens]], Sequence[TokenStates]]
) -> list[Row]:
    """The rows with the reference's log-probabilities of pairs that have none yet.

    Args:
        read: Reads (prompt, completion) pairs with the reference.
    """
    unread = [row for row in rows if row.chosen is not None and row.ref_logprobs is None]
    parts = [part for row in unread for part in (row, row.chosen) if part is not None]
    sequences = [*dict.fromkeys(part.tokens for part in parts)]
    if not sequences:
        return list(rows)
    states = dict(zip(sequences, read(sequences), strict=True))

    def filled(row: Row) -> Row:
        logprobs = states[row.tokens].logprobs.tolist()
        return replace(row, ref_logprobs=tuple(logprobs), chosen=row.chosen and filled(row.chosen))

    return [filled(row) if row.chosen is not None and row.ref_logprobs is None else row for row in rows]


def _paired(row: Row, chosen: Row) -> Row:
    return replace(row, components=row.components | PREFERENCE, chosen=chosen)
