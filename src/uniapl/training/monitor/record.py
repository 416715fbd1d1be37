"""The record of a step: one line of metrics.jsonl."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config.objective import ObjectiveConfig
from uniapl.rewards import RewardOutcome
from uniapl.training.monitor import metrics
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.credit import Credit
from uniapl.training.update.policy_step import PolicyStep
from uniapl.types import Rollout, RolloutGroup, TokenIds, Tokens


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of the parts of a step."""

    groups: Sequence[RolloutGroup]
    discarded: Sequence[RolloutGroup] = ()
    """Groups that were sampled and replaced by those of other prompts."""
    sampling_metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """What was replaced and skipped."""
    outcomes: Mapping[str, Sequence[RewardOutcome]]
    """Outcomes of each reward function, one per process."""
    pair_metrics: Mapping[str, float]
    """Metrics of the step's pairs of rollout and demonstration, and of the controller of lambda_adv."""
    batch: MixedBatch
    gradient_metrics: Mapping[str, float]
    """Norms and cosines of the loss components' gradients."""
    update: PolicyStep
    discriminator_metrics: Mapping[str, Any]
    """Metrics of the discriminator's updates."""

    @property
    def sampled(self) -> Sequence[RolloutGroup]:
        """All groups of the step, with those that were replaced."""
        return [*self.groups, *self.discarded]

    @property
    def num_rollouts(self) -> int:
        """Rollouts that were sampled."""
        return sum(len(group.rollouts) for group in self.sampled)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rollouts and demonstrations, with the prompt of each (TRL's `num_tokens`)."""
        discarded = sum(
            group.completion_tokens + len(group.rollouts) * len(group.example.prompt_ids)
            for group in self.discarded
        )
        return self.batch.num_tokens + discarded


def step_record(
    result: StepResult,
    objective: ObjectiveConfig,
    *,
    step: int,
    stage: int,
    learning_rate: float,
    epoch: float,
    num_tokens: int,
    has_adversary: bool,
) -> dict[str, Any]:
    """All metrics of a step, except for evaluation and times.

    A metric of a reward function that has the name of another metric gets the prefix "log_metric/".
    """
    batch, update = result.batch, result.update
    record = {
        "step": step,
        "stage": stage,
        **metrics.update_metrics(update, batch.counts, batch.weights),
        "tokens/rollout": batch.rollout_tokens + sum(g.completion_tokens for g in result.discarded),
        "tokens/pref": batch.pair_tokens,
        "weight/lambda_adv": batch.lambda_adv,
        **result.gradient_metrics,
        **({"adversary/active": int(adversary_acts(batch))} if has_adversary else {}),
        **metrics.rollout_metrics(result.sampled, batch.credits, objective, step=step - 1),
        **metrics.length_metrics(result.sampled),
        **result.sampling_metrics,
        **result.pair_metrics,
        **result.discriminator_metrics,
        **metrics.reward_health(result.outcomes),
        "learning_rate": learning_rate,
        "epoch": epoch,
        "num_tokens": num_tokens,
        "skipped": int(not update.applied),
    }
    logged = logged_by_rewards(result.outcomes)
    return record | {f"log_metric/{k}" if k in record else k: value for k, value in logged.items()}


def adversary_acts(batch: MixedBatch) -> bool:
    """Whether the adversary changed a reward or an advantage, or has a loss component with a completion.

    Multiplication changes no reward of 0 and no penalty.
    """
    own_loss = batch.weights["adv"] > 0
    return batch.lambda_adv > 0 and any(
        _any_known(credit.win_rates) and (own_loss or _changed(credit)) for credit in batch.credits
    )


def _changed(credit: Credit) -> bool:
    return any(credit.reward_changes) if credit.reward_changes else _any_known(credit.advantages)


def _any_known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def logged_by_rewards(outcomes: Mapping[str, Sequence[RewardOutcome]]) -> dict[str, float]:
    """The mean over all calls and processes of each metric that reward functions log by `log_metric`."""
    logged: dict[str, list[float]] = {}
    for part in itertools.chain.from_iterable(outcomes.values()):
        for name, values in part.metrics.items():
            logged.setdefault(name, []).extend(values)
    return {name: statistics.fmean(values) for name, values in logged.items()}


def completion_records(
    step: int, result: StepResult, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The lines of completions.jsonl, one per prompt; those of groups that were replaced are marked."""
    found = [
        _completion_record(step, *pair, tokenizer)
        for pair in zip(result.groups, result.batch.credits, strict=True)
    ]
    replaced = [_completion_record(step, group, None, tokenizer) for group in result.discarded]
    return found + [record | {"discarded": True} for record in replaced]


def _completion_record(
    step: int, group: RolloutGroup, credit: Credit | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    shown = group.example.demonstration_tokens
    return {
        "step": step,
        "row": group.example.row,
        "prompt": group.example.prompt,
        "demonstration": group.example.demonstration,
        "demonstration_tokens": None if shown is None else shown.num_written,
        **({"demonstration_segments": segments(shown, tokenizer)} if shown and shown.given else {}),
        "completions": [
            {
                "text": text,
                "tokens": rollout.num_sampled,
                "finish_reason": rollout.finish_reason,
                **(_trajectory(tokens, rollout, tokenizer) if rollout.messages else {}),
                "reward": reward,
                "rewards": {name: values[i] for name, values in group.reward_parts.items()},
                **({"extra": {k: values[i] for k, values in group.extra.items()}} if group.extra else {}),
                "advantage": credit.advantages[i] if credit else None,
                "win_rate": credit.win_rates[i] if credit else None,
            }
            for i, (text, rollout, tokens, reward) in enumerate(
                zip(
                    group.texts,
                    group.rollouts,
                    group.tokens(demonstration=False),
                    group.rewards,
                    strict=True,
                )
            )
        ],
    }


def _trajectory(tokens: Tokens, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "messages": list(rollout.messages),
        "segments": segments(tokens, tokenizer),
        "tool_use": asdict(rollout.tool_use),
    }


def segments(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The completion in parts: written by the policy or the expert, or given to them between their turns.

    The text has the special tokens, because they are trained too.

    Example:
        [{"written": True, "text": "<tool_call>...</tool_call><|im_end|>"},
         {"written": False, "text": "<|im_start|>user...3...<|im_start|>assistant"},
         {"written": True, "text": "3<|im_end|>"}]
    """

    def text(ids: TokenIds) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    bounds = [0, *itertools.chain.from_iterable(tokens.given), len(tokens.completion)]
    return [
        {"written": number % 2 == 0, "text": text(tokens.completion[start:stop])}
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        if stop > start
    ]
