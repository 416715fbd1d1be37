"""Which completions become preference pairs, and their rows."""

from dataclasses import replace

import torch

from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import Row
from uniapl.models.token_states import Tokens, TokenStates
from uniapl.training.update.credit import assign_credit, known_passing, rollout_rows
from uniapl.training.update.pairs import pair_rejected, pair_rollouts, with_reference
from uniapl.types import Example, Rollout, RolloutGroup

OBJECTIVE = ObjectiveConfig(pref_weight=1.0)


def example(**changes: object) -> Example:
    values = {"row": 1, "prompt": "p", "prompt_ids": (5, 6), "demonstration": "d", "columns": {}}
    values |= {"demonstration_ids": (7, 1)}
    return Example(**(values | changes))  # type: ignore[arg-type]


def group(
    rewards: tuple[float | None, ...], *, name: str = "right", demonstration: tuple[int, ...] | None = (7, 1)
) -> RolloutGroup:
    """The n-th rollout has n + 1 tokens; the second one is the demonstration (7, 1)."""
    ids = [(8,), (7, 1), (8, 8, 1), (9, 9, 9, 1)]
    return RolloutGroup(
        example=example(demonstration_ids=demonstration),
        rollouts=tuple(
            Rollout(
                completion_ids=y,
                sampling_logprobs=(-1.0,) * len(y),
                finish_reason="length" if y == (8,) else "stop",
                policy_version=0,
                ref_logprobs=(-2.0,) * len(y),
            )
            for y in ids
        ),
        rewards=rewards,
        reward_parts={name: rewards},
        demonstration_ref_logprobs=(-3.0, -4.0),
    )


def paired(
    item: RolloutGroup, objective: ObjectiveConfig = OBJECTIVE, *, rewarded: bool = True, masked: bool = False
) -> list[Row]:
    credits = assign_credit([item], objective, expert_mean=None, lambda_adv=0.0)
    rows = rollout_rows([item], credits, temperature=0.5, mask_truncated=masked)
    return pair_rollouts(rows, [item], objective, is_rewarded=lambda _: rewarded)


def rejected(rows: list[Row]) -> list[int]:
    assert [row.chosen is not None for row in rows] == ["pref" in row.components for row in rows]
    return [number for number, row in enumerate(rows) if row.chosen is not None]


def test_the_rollouts_that_do_not_pass_are_rejected() -> None:
    """Not one whose reward is unknown, and not one that is the demonstration."""
    rows = paired(group((0.0, 0.0, 1.0, 0.5)))
    assert rejected(rows) == [0, 3]
    assert rejected(paired(group((0.0, 0.0, 1.0, None)))) == [0]
    assert rows[0].chosen == Row(
        prompt_ids=(5, 6),
        completion_ids=(7, 1),
        components=frozenset({"pref"}),
        temperature=0.5,
        ref_logprobs=(-3.0, -4.0),
    )
    assert rows[0].components == {"kl", "rl", "pref"}
    assert rows[0].ref_logprobs == (-2.0,)
    assert rows[0].advantage != 0


def test_every_rollout_of_a_prompt_without_a_reward_is_rejected() -> None:
    """As in SPIN. If a function applies and fails on all of them, none is."""
    unknown = group((None,) * 4)
    assert rejected(paired(unknown, rewarded=False)) == [0, 2, 3]
    assert rejected(paired(unknown)) == []


def test_no_function_decides_in_place_of_one_that_failed() -> None:
    """The reward is unknown, so that it is unknown which completions pass."""
    item = replace(group((None, None, None, 0.0)), reward_parts={"right": (None,) * 4, "form": (0.0,) * 4})
    assert rejected(paired(item)) == [3]
    assert known_passing(item, OBJECTIVE) == [False]


def test_completions_that_differ_only_in_what_closes_them_are_equal() -> None:
    item = group((0.0,) * 4, demonstration=(8, 8, 3))
    assert rejected(paired(item)) == [0, 1, 2, 3]
    credits = assign_credit([item], OBJECTIVE, expert_mean=None, lambda_adv=0.0)
    rows = rollout_rows([item], credits, temperature=0.5)
    found = pair_rollouts(
        rows,
        [item],
        OBJECTIVE,
        is_rewarded=lambda _: True,
        text_length=lambda ids: len(ids) - (ids[-1] in (1, 3)),
    )
    assert rejected(found) == [0, 1, 3]


def test_the_deciding_function_and_its_threshold_are_those_of_the_configuration() -> None:
    item = replace(
        group((2.0, 2.0, 2.0, 0.0)),
        reward_parts={"length": (2.0, 2.0, 2.0, 0.0), "right": (0.0, 0.0, 0.6, 0.4)},
    )
    assert rejected(paired(item)) == [3]
    deciding = ObjectiveConfig(pref_weight=1.0, pass_reward="right", pass_threshold=0.5)
    assert rejected(paired(item, deciding)) == [0, 3]


def test_completions_outside_the_loss_and_prompts_without_demonstration_have_no_pair() -> None:
    assert rejected(paired(group((0.0,) * 4), masked=True)) == [2, 3]
    assert rejected(paired(group((0.0,) * 4, demonstration=None))) == []


def test_pairs_of_the_data_and_their_reference() -> None:
    """Rows without a rejected completion, or with one that equals the demonstration, have none."""
    examples = [
        example(rejected_ids=(9, 9, 1)),
        example(row=2),
        example(row=3, rejected_ids=(7, 1)),
        example(row=4, rejected_ids=(8, 1)),
    ]
    rows = pair_rejected(examples, temperature=0.5)
    assert [row.completion_ids for row in rows] == [(9, 9, 1), (8, 1)]
    read: list[Tokens] = []

    def reference(sequences: object) -> list[TokenStates]:
        read.extend(sequences)  # type: ignore[arg-type]
        return [
            TokenStates(logprobs=-torch.tensor(y).float(), states=torch.empty(len(y), 0)) for _, y, _ in read
        ]

    rollout = Row(prompt_ids=(1,), completion_ids=(2,), components=frozenset({"kl"}))
    first, last, other = with_reference([*rows, rollout], reference)
    # The demonstration that two rows share is read once.
    assert [tokens.pair for tokens in read] == [((5, 6), y) for y in ((9, 9, 1), (7, 1), (8, 1))]
    assert first.ref_logprobs == (-9.0, -9.0, -1.0)
    assert last.ref_logprobs == (-8.0, -1.0)
    assert first.chosen is not None
    assert first.chosen.ref_logprobs == (-7.0, -1.0)
    assert first.chosen == last.chosen
    assert (first.components, first.temperature) == (frozenset({"pref"}), 0.5)
    assert other == rollout
