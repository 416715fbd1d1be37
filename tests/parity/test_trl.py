"""TRL's trainers as an oracle: the same tokens, the same weights, the same loss and gradients as ours.

TRL goes its own way from end to end: its collators pad, its trainers score, scale and accumulate, and
`training_step` calls backward. Ours gets the bare token ids and goes another way: right padding, masks from
`uniapl.data.batching`, other micro-batches. Only the weights, the ids and, for the loss, the advantages are
shared, so nothing but the formulas can make the two agree.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from uniapl.config import DataConfig
from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import Row, component_counts, demonstration_rows, micro_batches
from uniapl.data.rows import tokenize_row
from uniapl.functional import (
    clip_counts,
    clipped_surrogate,
    decoupled_advantages,
    group_advantages,
    importance_weights,
    k3_kl,
    objective,
    sft_loss,
)
from uniapl.models.policy import Policy, inputs_of
from uniapl.models.token_states import TokenReader
from uniapl.training.monitor.metrics import rollout_metrics, update_metrics
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.credit import assign_credit, rollout_rows
from uniapl.training.update.policy_step import LossSettings, policy_step
from uniapl.types import Example, MicroBatch, Rollout, RolloutGroup, Tokens

# TRL still uses these names itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")

VOCABULARY = 97
PAD, EOS, UNKNOWN = 0, 1, 2

TOLERANCE = 1e-5
"""For losses, and for gradients relative to the largest entry of each one; both sides compute in fp32."""
VISIBLE = 1e-4
"""Every parameter's largest gradient must exceed this: where both are zero, agreement would prove nothing."""

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}

# Lengths differ within a group's completions and between prompts, so that padding differs on every side.
PROMPTS = ((5, 9, 31), (40, 41, 42, 43, 44, 45, 46, 3))
COMPLETIONS = (
    (50, 51, 52, 53, 54, 55, EOS),
    (60, EOS),
    (61, 62, 63, 5, 5),
    (EOS,),
    (70, 71, 72, 73),
    (80, 81, 82, EOS),
    (90, 91, 92, 93, 94, 95, 96, 12, EOS),
    (13, 14),
)
GROUP = 4
REWARDS = (1.0, 0.25, -0.5, 0.0, 2.0, 0.0, 1.0, 0.5)


@pytest.fixture(autouse=True)
def undisturbed_process() -> Iterator[None]:
    """Take back what TRL's trainers do to the process: environment, seeds, accelerate's singletons."""
    with ExitStack() as stack:
        # With "CI" set TRL sends no telemetry.
        stack.enter_context(mock.patch.dict(os.environ, {"CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}))
        for singleton in (AcceleratorState, GradientState, PartialState):
            stack.enter_context(mock.patch.dict(singleton._shared_state, clear=True))
        stack.enter_context(torch.random.fork_rng())
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id, "w5" is 5."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    for special, number in (("<pad>", PAD), ("<eos>", EOS), ("<unk>", UNKNOWN)):
        del vocabulary[f"w{number}"]
        vocabulary[special] = number
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(seed: int, *, tied: bool = False) -> Qwen3ForCausalLM:
    """Random weights large enough for probabilities, and so gradients, that are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=64,
                initializer_range=0.2,
                tie_word_embeddings=tied,
                pad_token_id=PAD,
                bos_token_id=None,
                eos_token_id=EOS,
            )
        )


def moved(model: Qwen3ForCausalLM, *, by: float) -> Qwen3ForCausalLM:
    """A copy some updates away: every weight shifted by noise."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), "a parameter has no gradient"
    return {name: grad for name, grad in found.items() if grad is not None}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One optimizer step's loss and gradients, added up over its micro-batches."""

    loss: Tensor
    grads: dict[str, Tensor]
    clipped: tuple[float, float] = (0.0, 0.0)
    """Tokens stopped by the lower and by the upper clip."""


def assert_same(ours: Result, theirs: Result) -> None:
    """Equal losses, and equal, visible gradients of every parameter."""
    assert_close(ours.loss, theirs.loss, atol=TOLERANCE, rtol=0)
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        largest = float(grad.abs().max())
        assert largest > VISIBLE, f"the gradient of {name} is too small to compare"
        # Never looser than TOLERANCE itself, however large the gradient.
        assert_close(
            ours.grads[name],
            grad,
            atol=TOLERANCE * min(1.0, largest),
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# --- GRPO ---------------------------------------------------------------------


def grpo_trainer(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    rewards: Sequence[float | None] = REWARDS,
    more_rewards: Sequence[Sequence[float | None]] = (),
    sampling_logprobs: Mapping[tuple[int, ...], tuple[float, ...]] | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """A trainer whose rollouts and rewards are given; one optimizer step is one pass over them."""

    def given_rollouts(prompts: list[str], _: GRPOTrainer) -> dict[str, list[Any]]:
        answers = [list(COMPLETIONS[row % len(COMPLETIONS)]) for row in range(len(prompts))]
        return {
            "prompt_ids": [list(ids) for ids in tokenizer(prompts).input_ids],
            "completion_ids": answers,
            "logprobs": [
                [0.0] * len(answer) if sampling_logprobs is None else list(sampling_logprobs[tuple(answer)])
                for answer in answers
            ],
        }

    def given_rewards(row: list[int], **_: Any) -> list[float | None]:
        return [rewards[number] for number in row]

    def others(values: Sequence[float | None]) -> Callable[..., list[float | None]]:
        def other_rewards(row: list[int], **_: Any) -> list[float | None]:
            return [values[number] for number in row]

        return other_rewards

    settings = {
        "num_generations": GROUP,
        "per_device_train_batch_size": 4,
        "scale_rewards": "none",
        # GRPO's KL term as published; TRL's own default is another formula, which a test below spells out.
        "use_bias_correction_kl": False,
        "loss_type": "dapo",
        "epsilon": CLIP["clip_low"],
        "epsilon_high": CLIP["clip_high"],
    } | settings
    accumulation = len(rewards) // settings["per_device_train_batch_size"]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[given_rewards, *(others(values) for values in more_rewards)],
        args=GRPOConfig(
            output_dir=str(folder / "grpo"),
            report_to="none",
            use_cpu=True,
            bf16=False,  # TRL's default is autocast
            gradient_checkpointing=False,
            gradient_accumulation_steps=accumulation,
            max_completion_length=16,
            seed=0,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w5", "row": 0}]),
        processing_class=tokenizer,
        rollout_func=given_rollouts,
    )
    # What `Trainer.train` sets before it calls `training_step` for each micro-batch of an optimizer step.
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.model.train()
    return trainer


def generation_batch(number_of_rows: int) -> list[dict[str, Any]]:
    """What TRL's sampler would hand over: every prompt GROUP times in a row."""
    texts = [" ".join(f"w{number}" for number in prompt) for prompt in PROMPTS]
    return [{"prompt": texts[row // GROUP % len(texts)], "row": row} for row in range(number_of_rows)]


def trl_grpo_step(trainer: GRPOTrainer) -> Result:
    """All micro-batches of one optimizer step through TRL's own `training_step`."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    losses: list[Tensor] = []
    clipped = [0.0, 0.0]
    for _ in range(trainer.args.gradient_accumulation_steps):
        losses.append(trainer.training_step(trainer.model, generation_batch(len(COMPLETIONS)), None))
        micro_batch = trainer._buffered_inputs[(trainer._step - 1) % trainer.args.steps_per_generation]
        mask = micro_batch["completion_mask"]
        by_sequence = trainer.importance_sampling_level == "sequence"
        number = len(mask) if by_sequence else float(mask.sum())
        cispo = trainer.loss_type == "cispo"
        names = ("", "cispo_clip_ratio") if cispo else ("clip_ratio/low_mean", "clip_ratio/high_mean")
        for side, name in enumerate(names):
            clipped[side] += trainer._metrics["train"][name][-1] * number if name else 0.0
    return Result(
        loss=torch.stack(losses).sum(), grads=gradients(trainer.model), clipped=(clipped[0], clipped[1])
    )


def rows_of(trainer: GRPOTrainer, *, temperature: float, known: Sequence[bool] | None = None) -> list[Row]:
    """The rollouts that TRL trained on, without its padding, in the given order, with its advantages."""
    rows: dict[tuple[int, ...], Row] = {}
    for micro_batch in trainer._buffered_inputs:
        for prompt, prompt_mask, completion, completion_mask, advantage in zip(
            *(
                micro_batch[name]
                for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            ),
            micro_batch["advantages"],
            strict=True,
        ):
            completion_ids = tuple(completion[completion_mask.bool()].tolist())
            with_reward = known is None or known[COMPLETIONS.index(completion_ids)]
            rows[completion_ids] = Row(
                prompt_ids=tuple(prompt[prompt_mask.bool()].tolist()),
                completion_ids=completion_ids,
                components=frozenset({"rl", "kl"} if with_reward else {"kl"}),
                advantage=float(advantage),
                temperature=temperature,
                sampling_logprobs=(0.0,) * len(completion_ids),
            )
    ordered = [rows[completion_ids] for completion_ids in COMPLETIONS]
    assert [row.prompt_ids for row in ordered] == [prompt for prompt in PROMPTS for _ in range(GROUP)]
    return ordered


def our_grpo_step(
    model: Qwen3ForCausalLM,
    rows: Sequence[Row],
    *,
    old: Qwen3ForCausalLM | None = None,
    reference: Qwen3ForCausalLM | None = None,
    beta: float = 0.0,
    kl: Callable[..., Tensor] = k3_kl,
    importance_cap: float | None = None,
) -> Result:
    """The same step ours: three micro-batches of like lengths, right-padded."""
    policy = Policy(model)
    counts, loss, clipped = component_counts(rows), torch.zeros(()), torch.zeros(2)
    for batch in micro_batches(rows, pad_id=PAD, max_tokens=10_000, max_rows=3):
        inputs = (
            batch.input_ids,
            batch.attention_mask,
            batch.position_ids,
            batch.rollout_mask,
            batch.temperature,
        )
        logprobs, _ = policy(*inputs)
        with torch.no_grad():
            old_logprobs = logprobs.detach() if old is None else Policy(old)(*inputs)[0]
            ref_logprobs = None if reference is None else Policy(reference)(*inputs)[0]
        ratio_inputs = (logprobs, old_logprobs, batch.advantages, batch.rl_mask)
        weights = None
        if importance_cap is not None:
            sampled = (old_logprobs, batch.sampling_logprobs, batch.rollout_mask)
            weights = importance_weights(*sampled, cap=importance_cap)
        sums = {"rl": clipped_surrogate(*ratio_inputs, weights=weights, **CLIP)}
        if ref_logprobs is not None:
            sums["kl"] = kl(logprobs, ref_logprobs, batch.rollout_mask)
        micro_loss = objective(sums, {"rl": 1.0, "kl": beta}, counts)
        micro_loss.backward()
        loss += micro_loss.detach()
        clipped += torch.stack(clip_counts(*ratio_inputs, **CLIP))
    return Result(loss=loss, grads=gradients(model), clipped=(float(clipped[0]), float(clipped[1])))


@pytest.mark.parametrize(
    ("temperature", "tied"), [(1.0, False), (0.7, False), (0.7, True)], ids=["plain", "cool", "cool-tied"]
)
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no-kl", "kl"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
def test_grpo_step_has_trls_dapo_loss_and_gradients(
    off_policy: bool,
    beta: float,
    temperature: float,
    tied: bool,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    sampler = tiny_model(0, tied=tied)
    reference = moved(sampler, by=-0.01)
    updated = moved(sampler, by=0.02) if off_policy else sampler
    theirs, ours = deepcopy(sampler), deepcopy(updated)
    # TRL loads its reference model from where the policy's weights came from.
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    trainer = grpo_trainer(
        theirs,
        tokenizer,
        tmp_path,
        beta=beta,
        temperature=temperature,
        # Only for a second update on the same rollouts does TRL keep the sampler's log-probabilities.
        num_iterations=2 if off_policy else 1,
    )
    expected = trl_grpo_step(trainer)
    assert ("old_per_token_logps" in trainer._buffered_inputs[0]) == off_policy
    if off_policy:
        theirs.load_state_dict(updated.state_dict())
        expected = trl_grpo_step(trainer)

    rows = rows_of(trainer, temperature=temperature)
    result = our_grpo_step(
        ours,
        rows,
        old=sampler if off_policy else None,
        reference=reference if beta else None,
        beta=beta,
    )

    assert_same(result, expected)
    assert result.clipped == pytest.approx(expected.clipped, abs=1e-4)
    tokens = sum(len(row.completion_ids) for row in rows)
    if off_policy:
        assert min(expected.clipped) >= 2, "each clip must stop some tokens"
        assert sum(expected.clipped) < 0.7 * tokens, "and leave others"
    else:
        assert expected.clipped == (0.0, 0.0)


class KeepGradients(torch.optim.SGD):
    """An optimizer that keeps the gradient of its step and changes nothing."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def our_policy_step(
    model: Qwen3ForCausalLM,
    rows: Sequence[Row],
    *,
    old: Qwen3ForCausalLM | None = None,
    reference: Qwen3ForCausalLM | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    **settings: Any,
) -> Result:
    """A step of `policy_step`, as in a run: three micro-batches of like lengths, right-padded."""

    def logprobs_of(other: Qwen3ForCausalLM, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            return Policy(other)(*inputs_of(batch, batch.rollout_mask))[0]

    batches = micro_batches(rows, pad_id=PAD, max_tokens=10_000, max_rows=3)
    if reference is not None:
        batches = [replace(batch, ref_logprobs=logprobs_of(reference, batch)) for batch in batches]
    old_logprobs = None if old is None else [logprobs_of(old, batch) for batch in batches]
    policy = Policy(model)
    optimizer = KeepGradients(policy.parameters(), lr=1.0)
    weights = {"sft": 0.0, "rl": 1.0, "adv": 0.0, "kl": beta, "entropy": -entropy_coef}
    mixed = MixedBatch(rows=rows, micro_batches=batches, weights=weights)
    given = {"max_completion_length": 16, **CLIP, **settings}
    result = policy_step(Accelerator(cpu=True), policy, optimizer, mixed, LossSettings(**given), old_logprobs)
    names = [name for name, _ in model.named_parameters()]
    return Result(
        loss=torch.tensor(result.sums["loss"]),
        grads=dict(zip(names, optimizer.gradients, strict=True)),
        clipped=(result.sums["clip_low"], result.sums["clip_high"]),
    )


@pytest.mark.filterwarnings("ignore:.*importance_sampling_level.*")
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no-kl", "kl"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
def test_every_loss_type_and_level_has_trls_loss_and_gradients(
    loss_type: str,
    level: str,
    off_policy: bool,
    beta: float,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    sampler = tiny_model(0)
    reference = moved(sampler, by=-0.01)
    updated = moved(sampler, by=0.02) if off_policy else sampler
    theirs, ours = deepcopy(sampler), deepcopy(updated)
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    # A sequence's ratio, a mean, is nearer to 1.
    low, high = (CLIP["clip_low"], CLIP["clip_high"]) if level == "token" else (0.01, 0.02)
    high += loss_type == "cispo"
    trainer = grpo_trainer(
        theirs,
        tokenizer,
        tmp_path,
        beta=beta,
        temperature=0.7,
        num_iterations=2 if off_policy else 1,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=low,
        epsilon_high=high,
        # TRL's bnpo depends on its micro-batches: here the step is one, as ours always is.
        per_device_train_batch_size=8 if loss_type == "bnpo" else 4,
    )
    expected = trl_grpo_step(trainer)
    if off_policy:
        theirs.load_state_dict(updated.state_dict())
        expected = trl_grpo_step(trainer)
    result = our_policy_step(
        ours,
        rows_of(trainer, temperature=0.7),
        old=sampler if off_policy else None,
        reference=reference if beta else None,
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=level,
        clip_low=low,
        clip_high=high,
    )
    assert_same(result, expected)
    assert result.clipped == pytest.approx(expected.clipped, abs=1e-4)
    assert off_policy == (sum(expected.clipped) > 0)


def test_the_entropy_bonus_is_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL's mean is over a micro-batch, so its step is one here."""
    theirs = tiny_model(0)
    ours = deepcopy(theirs)
    options: dict[str, Any] = {"loss_type": "grpo", "entropy_coef": 0.2}
    trainer = grpo_trainer(
        theirs, tokenizer, tmp_path, temperature=0.7, per_device_train_batch_size=8, **options
    )
    expected = trl_grpo_step(trainer)
    rows = rows_of(trainer, temperature=0.7)
    assert_same(our_policy_step(ours, rows, **options), expected)
    without = our_policy_step(ours, rows, loss_type="grpo")
    assert abs(float(without.loss - expected.loss)) > 0.1


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_masked_truncated_completions_are_trls(
    loss_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Their rewards count in the advantages of the others.

    A difference on purpose: TRL counts them as completions in the divisors of grpo and dr_grpo; ours leave
    them out, as all rollouts that have no loss.
    """
    theirs = tiny_model(0)
    reference, ours = moved(theirs, by=-0.01), deepcopy(theirs)
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    trainer = grpo_trainer(
        theirs, tokenizer, tmp_path, loss_type=loss_type, mask_truncated_completions=True, beta=0.3
    )
    expected = trl_grpo_step(trainer)
    groups = rollout_groups(REWARDS)
    unscaled = ObjectiveConfig(scale_rewards="none")
    credits = assign_credit(groups, unscaled, expert_mean=None, lambda_adv=0.0)
    rows = rollout_rows(groups, credits, temperature=1.0, mask_truncated=True)
    kept = sum(row.completion_ids[-1] == EOS for row in rows)
    assert component_counts(rows)["kl"] == sum(len(c) for c in COMPLETIONS if c[-1] == EOS)
    assert 0 < kept < len(rows)
    factor = 1.0 if loss_type == "dapo" else len(rows) / kept
    result = our_policy_step(ours, rows, reference=reference, beta=0.3, loss_type=loss_type)
    grads = {name: grad * factor for name, grad in expected.grads.items()}
    assert_same(result, Result(loss=expected.loss * factor, grads=grads))


@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no-kl", "kl"])
def test_importance_weights_are_trls_token_truncate(
    beta: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The sampler was another policy: every token's term, but not the KL's, is weighted and capped."""
    theirs = tiny_model(0)
    reference, sampler = moved(theirs, by=-0.01), moved(theirs, by=0.05)
    ours = deepcopy(theirs)
    reported: dict[tuple[int, ...], tuple[float, ...]] = {}
    for number, completion in enumerate(COMPLETIONS):
        prompt = PROMPTS[number // GROUP]
        with torch.no_grad():
            logits = sampler(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])
        reported[completion] = tuple(chosen.squeeze(-1).tolist())
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    trainer = grpo_trainer(theirs, tokenizer, tmp_path, beta=beta, sampling_logprobs=reported)
    # As if a vLLM had answered, and already had these weights.
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer.vllm_importance_sampling_clip_max, trainer.vllm_importance_sampling_clip_min = 2.0, None
    expected = trl_grpo_step(trainer)
    ratios = torch.cat(
        [
            part["importance_sampling_ratio"][part["completion_mask"].bool()]
            for part in trainer._buffered_inputs
        ]
    )
    assert (ratios == 2).sum() > 2
    assert (ratios < 0.8).sum() > 2

    rows = [
        replace(row, sampling_logprobs=reported[row.completion_ids])
        for row in rows_of(trainer, temperature=1.0)
    ]
    weighted = our_grpo_step(ours, rows, reference=reference if beta else None, beta=beta, importance_cap=2.0)
    assert_same(weighted, expected)


SAME_ROLLOUTS = (
    "reward", "reward_std", "rewards/given_rewards/mean", "rewards/given_rewards/std",
    "frac_reward_zero_std", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length",
)  # fmt: skip
"""Metrics of the rollouts; those of the update have other denominators in each of TRL's micro-batches."""


@pytest.mark.case(23)
@pytest.mark.parametrize(
    "rewards",
    [
        (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        REWARDS,
        (None, 0.25, -0.5, 0.0, 2.0, 2.0, None, 2.0),
        (None, None, None, None, 2.0, 2.0, None, 2.0),
        (0.5, None, None, None, 1.0, 0.0, 0.0, 0.0),
    ],
    ids=["case-23", "mixed", "one-unknown", "group-unknown", "one-known"],
)
def test_metrics_with_trls_names_have_trls_values(
    rewards: tuple[float | None, ...], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    theirs = tiny_model(0)
    reference, ours = moved(theirs, by=-0.01), deepcopy(theirs)
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    trainer = grpo_trainer(theirs, tokenizer, tmp_path, rewards=rewards, beta=0.3, temperature=0.7)
    trl_grpo_step(trainer)
    logged = trainer._metrics["train"]

    groups = rollout_groups(rewards)
    unscaled = ObjectiveConfig(scale_rewards="none")
    credits = assign_credit(groups, unscaled, expert_mean=None, lambda_adv=0.0)
    reader = TokenReader(
        model=Policy(reference),
        layers=(),
        temperature=0.7,
        pad_id=PAD,
        max_tokens=10_000,
        packed=False,
        device=torch.device("cpu"),
    )
    rows = rollout_rows(groups, credits, temperature=0.7)
    states = reader.read([Tokens(row.prompt_ids, row.completion_ids) for row in rows])
    rows = [replace(r, ref_logprobs=tuple(s.logprobs.tolist())) for r, s in zip(rows, states, strict=True)]
    batch = MixedBatch(
        rows=rows,
        micro_batches=micro_batches(rows, pad_id=PAD, max_tokens=10_000, max_rows=3),
        weights={"sft": 0.0, "rl": 1.0, "adv": 0.0, "kl": 0.3},
        credits=credits,
    )
    policy = Policy(ours)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    settings = LossSettings(clip_low=CLIP["clip_low"], clip_high=CLIP["clip_high"])
    update = policy_step(Accelerator(cpu=True), policy, optimizer, batch, settings)
    found = rollout_metrics(groups, credits, ObjectiveConfig(), step=0) | update_metrics(
        update, batch.counts, batch.weights
    )

    for name in SAME_ROLLOUTS:
        assert found[name] == pytest.approx(logged[name][-1], rel=1e-6, abs=1e-9), name
    assert batch.num_tokens == logged["num_tokens"][-1]
    tokens = [float(part["completion_mask"].sum()) for part in trainer._buffered_inputs]
    for mine, name in {"trained/entropy": "entropy", "kl": "kl", "clip_ratio/region_mean": None}.items():
        values = logged[name or mine]
        mean = sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)
        assert found[mine] == pytest.approx(mean, rel=1e-4, abs=1e-9), mine


def rollout_groups(rewards: Sequence[float | None]) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    for number, prompt_ids in enumerate(PROMPTS):
        part = slice(number * GROUP, (number + 1) * GROUP)
        groups.append(
            RolloutGroup(
                example=Example(
                    row=number,
                    prompt="",
                    prompt_ids=prompt_ids,
                    demonstration=None,
                    demonstration_ids=None,
                    columns={},
                ),
                rollouts=tuple(
                    Rollout(
                        completion_ids=ids,
                        sampling_logprobs=(0.0,) * len(ids),
                        finish_reason="stop" if ids[-1] == EOS else "length",
                        policy_version=0,
                    )
                    for ids in COMPLETIONS[part]
                ),
                rewards=tuple(rewards[part]),
                reward_parts={"given_rewards": tuple(rewards[part])},
            )
        )
    return groups


def test_trls_default_kl_is_ours_times_the_differentiable_ratio(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A difference of formula: `use_bias_correction_kl`, on by default in TRL, is not what GRPO published.

    On-policy the ratio is 1, so the losses agree; its gradient turns k3's, (1 - p_ref / p) times the score,
    into the reverse KL's, log(p / p_ref) times the score.
    """
    theirs = tiny_model(0)
    reference = moved(theirs, by=-0.01)
    ours, corrected = deepcopy(theirs), deepcopy(theirs)
    reference.save_pretrained(tmp_path / "reference")
    theirs.config._name_or_path = str(tmp_path / "reference")
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).use_bias_correction_kl
    trainer = grpo_trainer(theirs, tokenizer, tmp_path, beta=0.3, use_bias_correction_kl=True)
    expected = trl_grpo_step(trainer)
    rows = rows_of(trainer, temperature=1.0)

    def corrected_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
        importance = torch.where(mask, logprobs - logprobs.detach(), 0.0).exp()
        return (importance * (log_ratio.exp() - 1 - log_ratio)).sum()

    assert_same(our_grpo_step(corrected, rows, reference=reference, beta=0.3, kl=corrected_kl), expected)
    result = our_grpo_step(ours, rows, reference=reference, beta=0.3)
    assert_close(result.loss, expected.loss, atol=TOLERANCE, rtol=0)
    head = "lm_head.weight"
    assert (result.grads[head] - expected.grads[head]).abs().max() > 0.01


def test_rollouts_without_a_reward_do_not_dilute_our_loss_as_they_do_trls(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A difference on purpose: TRL gives such a rollout advantage 0 but counts its tokens; we leave them out.

    The sums agree, so multiplied by each one's own denominator the losses and gradients are equal.
    """
    rewards = (1.0, None, -0.5, 0.0, 2.0, 0.0, None, 0.5)
    theirs = tiny_model(0)
    ours = deepcopy(theirs)
    trainer = grpo_trainer(theirs, tokenizer, tmp_path, rewards=rewards)
    expected = trl_grpo_step(trainer)

    rows = rows_of(trainer, temperature=1.0, known=[reward is not None for reward in rewards])
    counts = component_counts(rows)
    assert counts["rl"] < counts["kl"]
    result = our_grpo_step(ours, rows)

    factor = counts["kl"] / counts["rl"]
    undiluted = {name: grad * factor for name, grad in expected.grads.items()}
    assert_same(result, Result(loss=expected.loss * factor, grads=undiluted))


# --- Advantages ---------------------------------------------------------------

GROUPS: Mapping[str, tuple[float | None, ...]] = {
    "distinct": (1.0, 0.25, -0.5, 3.0),
    "ties": (0.0, 1.0, 1.0, 0.0),
    "inexact": (0.1, 0.7, 0.2, 0.3),
    "far from zero": (1000.0, 1001.0, 1000.5, 1003.0),
    "nearly equal": (0.5, 0.5001, 0.5, 0.5),
    "all equal": (0.5, 0.5, 0.5, 0.5),
    "one unknown": (0.1, None, 0.9, 0.4),
    "two unknown": (None, 2.0, None, -1.0),
    "one known": (None, None, 0.7, None),
    "none known": (None, None, None, None),
}


def trl_advantages(
    groups: Sequence[Sequence[float | None]], scale: str, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Tensor:
    rewards = [reward for group in groups for reward in group]
    trainer = grpo_trainer(
        tiny_model(0),
        tokenizer,
        folder,
        rewards=rewards,
        scale_rewards=scale,
        num_generations=len(groups[0]),
        per_device_train_batch_size=len(groups[0]),
    )
    output = trainer._generate_and_score_completions(generation_batch(len(rewards)))
    return output["advantages"].view(len(groups), -1)


def our_advantages(groups: Sequence[Sequence[float | None]], scale: Any) -> Tensor:
    # NaN where unknown: what is not known must not be read.
    rewards = torch.tensor([[torch.nan if r is None else r for r in group] for group in groups])
    return group_advantages(rewards, ~rewards.isnan(), scale=scale)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantages_are_trls_also_where_rewards_are_unknown(
    scale: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    groups = list(GROUPS.values())
    expected = trl_advantages(groups, scale, tokenizer, tmp_path)
    assert_close(our_advantages(groups, scale), expected, atol=1e-6, rtol=0)
    # The rewards far from zero have a large part in the deviation of the batch.
    assert (expected[0].abs() > (1e-4 if scale == "batch" else 0.01)).all()


def test_decoupled_advantages_are_trls_normalize_then_sum(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GDPO, with functions of different scales, some without values, and different weights."""
    parts = (list(GROUPS.values()), list(GROUPS.values())[::-1], [(3.0, None, 1.0, 100.0)] * len(GROUPS))
    weights = (1.0, -0.5, 2.0)
    flat = [[value for group in part for value in group] for part in parts]
    trainer = grpo_trainer(
        tiny_model(0),
        tokenizer,
        tmp_path,
        rewards=flat[0],
        more_rewards=flat[1:],
        reward_weights=list(weights),
        multi_objective_aggregation="normalize_then_sum",
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
    )
    output = trainer._generate_and_score_completions(generation_batch(len(flat[0])))
    expected = output["advantages"].view(-1, GROUP)
    values = torch.tensor([[[torch.nan if v is None else v for v in g] for g in part] for part in parts])
    got = decoupled_advantages(values, ~values.isnan(), torch.tensor(weights))
    assert_close(got, expected, atol=1e-5, rtol=0)
    assert float(expected.abs().max()) > 1


def test_a_group_of_equal_rewards_gets_exactly_zero_where_trl_keeps_a_rounding_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A difference on purpose: the mean of equal fp32 numbers may miss them, and "group" divides by 1e-4."""
    groups = [(0.9,) * 8]
    assert (our_advantages(groups, "group") == 0).all()
    assert 1e-5 < trl_advantages(groups, "group", tokenizer, tmp_path).abs().max() < 1e-2


# --- SFT ----------------------------------------------------------------------

DEMONSTRATIONS = (
    {"prompt": "w5 w9 w31", "completion": " w50 w51 w52 w53 w54"},
    {"prompt": "w40", "completion": " w60 w61 w62 w63 w64 w65 w66 w67"},
    {"prompt": "w41 w42 w43 w44 w45 w46 w47", "completion": " w3"},
    {"prompt": "w7 w8", "completion": " w70 w71 w72<eos>"},
    {"prompt": "w20 w21 w22 w23", "completion": " w80 w80"},
)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("trl_loss", "token_weight"), [("nll", "none"), ("dft", "is")], ids=["nll", "dft-is-our-is"]
)
def test_sft_step_has_trls_loss_and_gradients(
    trl_loss: str, token_weight: Any, accumulation: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    theirs = tiny_model(1)
    ours = deepcopy(theirs)
    trainer = SFTTrainer(
        model=theirs,
        args=SFTConfig(
            output_dir=str(tmp_path / "sft"),
            report_to="none",
            use_cpu=True,
            bf16=False,  # TRL's default is autocast
            gradient_checkpointing=False,
            completion_only_loss=True,
            loss_type=trl_loss,
            gradient_accumulation_steps=accumulation,
            seed=0,
        ),
        train_dataset=Dataset.from_list([dict(row) for row in DEMONSTRATIONS]),
        processing_class=tokenizer,
    )
    samples = list(trainer.train_dataset)
    # Unequal micro-batches: a mean of means would not be the mean over tokens.
    chunks = [samples] if accumulation == 1 else [samples[:2], samples[2:]]
    # As in `Trainer.train`: the count of supervised tokens comes from TRL's own labels.
    batches, num_items = trainer.get_batch_samples(
        iter([trainer.data_collator(chunk) for chunk in chunks]), accumulation, torch.device("cpu")
    )
    trainer.current_gradient_accumulation_steps = accumulation
    assert num_items is not None
    supervised = sorted(
        tuple(labels[labels != -100].tolist()) for batch in batches for labels in batch["labels"]
    )
    losses = [trainer.training_step(trainer.model, batch, num_items) for batch in batches]
    expected = Result(loss=torch.stack(losses).sum(), grads=gradients(theirs))

    rows = [
        demonstration_rows(tokenize_row(number, row, tokenizer, DataConfig()))[0]
        for number, row in enumerate(DEMONSTRATIONS, start=1)
    ]
    assert sorted(row.completion_ids for row in rows) == supervised
    policy, counts, loss = Policy(ours), component_counts(rows), torch.zeros(())
    for batch in micro_batches(rows, pad_id=PAD, max_tokens=10_000, max_rows=3):
        logprobs, _ = policy(
            batch.input_ids, batch.attention_mask, batch.position_ids, batch.sft_mask, batch.temperature
        )
        micro_loss = objective(
            {"sft": sft_loss(logprobs, batch.sft_mask, token_weight=token_weight)}, {"sft": 1.0}, counts
        )
        micro_loss.backward()
        loss += micro_loss.detach()

    assert_same(Result(loss=loss, grads=gradients(ours)), expected)
