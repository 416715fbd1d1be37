"""What one stage trains: the policy with its optimizer, a reference, an adversary; and how it is saved."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModel, PreTrainedModel

from uniapl.config import Config
from uniapl.discriminator.bradley_terry import (
    AdversaryState,
    BradleyTerry,
    BradleyTerryDiscriminator,
    Comparison,
    Replay,
)
from uniapl.errors import UsageError
from uniapl.functional import (
    Multiplier,
    dual_ascent,
    expert_gap,
    learning_rate_factor,
    pid,
    reward_threshold,
    warmup_cosine,
)
from uniapl.rollout import Sampler
from uniapl.rollout.local import LocalSampler
from uniapl.train import checkpoint, metrics
from uniapl.train.credit import failed_prompts
from uniapl.train.policy import Policy
from uniapl.train.setup import Materials, load_model
from uniapl.train.step import discriminator_step
from uniapl.train.stopping import Stopping
from uniapl.types import Example, RolloutGroup, derive_seed


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator with everything that its own training needs."""

    discriminator: BradleyTerryDiscriminator
    module: nn.Module
    """The discriminator's module, wrapped for several processes."""
    optimizer: Optimizer
    replay: Replay
    state: AdversaryState

    def judge(self, groups: Sequence[RolloutGroup]) -> list[tuple[tuple[float, ...], float | None]]:
        """(logits of the rollouts, logit of the demonstration) of each group."""
        sequences = [(g.example.prompt_ids, r.completion_ids) for g in groups for r in g.rollouts]
        experts = [g.example for g in groups if g.example.demonstration_ids is not None]
        sequences += [(e.prompt_ids, e.demonstration_ids or ()) for e in experts]
        logits = iter(self.discriminator.score(sequences))
        policy = [tuple(next(logits) for _ in g.rollouts) for g in groups]
        expert = [next(logits) if g.example.demonstration_ids is not None else None for g in groups]
        return list(zip(policy, expert, strict=True))

    def learn(
        self,
        accelerator: Accelerator,
        groups: Sequence[RolloutGroup],
        config: Config,
        step: int,
        stage_step: int,
    ) -> dict[str, Any]:
        """Its updates of one step: fresh comparisons and a share of older ones, unless paused or frozen.

        Args:
            step: Of the run; seeds the draw of older comparisons.
            stage_step: Of the stage; freezing is counted in these.
        """
        settings = config.discriminator
        fresh = [
            Comparison.of(g)
            for g in groups
            if g.example.demonstration_ids is not None and not is_held_out(g.example, config)
        ]
        losses: list[float] = []
        skipped = 0
        frozen = settings.freeze_step is not None and stage_step >= settings.freeze_step
        if not (self.state.paused or frozen):
            replayed = round(len(fresh) * settings.replay_share / (1 - settings.replay_share))
            for update in range(settings.updates_per_step):
                seed = derive_seed(config.seed, "replay", step, update)
                comparisons = fresh + self.replay.draw(replayed, seed=seed)
                if not comparisons:
                    break
                loss, applied = discriminator_step(
                    accelerator,
                    self.discriminator,
                    self.module,
                    self.optimizer,
                    comparisons,
                    max_grad_norm=settings.max_grad_norm,
                )
                losses.append(loss)
                skipped += not applied
        self.replay.add(fresh)
        return {
            "discriminator/loss": sum(losses) / len(losses) if losses else None,
            "discriminator/updates": len(losses) - skipped,
            "discriminator/skipped": skipped,
            "discriminator/paused": int(self.state.paused),
        }


@dataclass(kw_only=True)
class Stage:
    """One stage of a run: its configuration and everything it changes."""

    config: Config
    index: int
    model: PreTrainedModel
    """The language model inside `policy`: what is sampled from and saved."""
    policy: nn.Module
    optimizer: Optimizer
    reference: Policy | None
    adversary: Adversary | None
    sampler: Sampler
    multiplier: Multiplier
    """lambda_adv, learned or not."""
    step: int = 0
    """Steps of this stage that are done."""
    tokens: int = 0
    """Tokens of completions that this stage has learnt from."""
    stopping: Stopping = field(default_factory=Stopping)

    @property
    def ended(self) -> bool:
        """Its last step is done, or a rule ended it."""
        return self.step >= self.config.max_steps or self.stopping.reason is not None

    @property
    def lambda_adv(self) -> float:
        """The adversary's weight at the current step: none before it is warm, or while it only guesses."""
        settings = self.config.discriminator
        if self.adversary is None or self.step < settings.warmup_steps:
            return 0.0
        objective = self.config.objective
        # gad: nothing else would move the policy.
        alone = not (objective.learns_from_rewards or objective.learns_from_demonstrations)
        informed = self.adversary.state.accuracy >= settings.min_accuracy
        return self.multiplier.value if informed or alone else 0.0

    def pair_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Of all fresh pairs, and of those whose demonstrations the discriminator never learns from."""
        unseen = [group for group in groups if is_held_out(group.example, self.config)]
        held_out = {k.replace("/", "/held_out_"): v for k, v in metrics.pair_metrics(unseen).items()}
        return metrics.pair_metrics(groups) | held_out

    def control(self, win_rate: float | None) -> dict[str, float]:
        """Let the multiplier answer to the fresh pairs' mean win rate, and say what it saw; None: no pairs.

        The constraint is on pairs alone: without a demonstration there is no calibrated zero.
        """
        objective = self.config.objective
        if win_rate is None or objective.lambda_controller == "fixed":
            return {}
        gap = expert_gap(win_rate)
        violation = gap - objective.max_expert_gap
        if self.step >= self.config.discriminator.warmup_steps:
            bounds = objective.lambda_bounds
            if objective.lambda_controller == "dual":
                rate = objective.lambda_learning_rate
                self.multiplier = dual_ascent(self.multiplier, violation, learning_rate=rate, bounds=bounds)
            else:
                self.multiplier = pid(self.multiplier, violation, gains=objective.lambda_gains, bounds=bounds)
        return {
            "constraint/expert_gap": gap,
            "constraint/violation": violation,
            "constraint/multiplier": self.multiplier.value,
        }

    def mu(self, groups: Sequence[RolloutGroup]) -> float:
        """The demonstrations' weight at the current step, which may depend on how its rollouts fared."""
        objective = self.config.objective
        if objective.mu_controller == "gate":
            return len(failed_prompts(groups, objective.gate_reward)) / len(groups)
        if objective.mu_controller == "reward":
            rewards = [reward for group in groups for reward in group.rewards if reward is not None]
            mean = sum(rewards) / len(rewards) if rewards else objective.mu_threshold
            return reward_threshold(
                mean,
                threshold=objective.mu_threshold,
                peak=objective.mu_peak,
                valley=objective.mu_valley,
            )
        return warmup_cosine(
            self.step,
            warmup_steps=objective.mu_warmup_steps,
            decay_steps=objective.mu_decay_steps,
            peak=objective.mu_peak,
            valley=objective.mu_valley,
        )

    def weights(self, mu: float) -> dict[str, float]:
        """The weight of each component at the current step."""
        objective = self.config.objective
        return {
            "sft": mu,
            "rl": (1 - mu) * objective.reward_weight,
            "adv": self.lambda_adv if objective.adversarial_placement == "loss" else 0.0,
            "kl": objective.beta,
        }

    def set_learning_rate(self) -> float:
        """Give the optimizer the current step's learning rate."""
        optim = self.config.optim
        rate = optim.learning_rate * learning_rate_factor(
            self.step,
            optim.lr_scheduler_type,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def save(self, directory: Path) -> dict[str, Any]:
        """Write all tensors of the stage below `directory`; return the rest, as JSON values."""
        checkpoint.save_optimizer(self.optimizer, directory / "policy_optimizer")
        state: dict[str, Any] = {
            "stage": self.index,
            "stage_step": self.step,
            "stage_tokens": self.tokens,
            "stopping": asdict(self.stopping),
            "stop_rule": self.config.stop.model_dump(),
        }
        if self.adversary is not None:
            checkpoint.save_module(
                self.adversary.discriminator.module, directory / "discriminator.safetensors"
            )
            checkpoint.save_optimizer(self.adversary.optimizer, directory / "discriminator_optimizer")
            state["adversary"] = asdict(self.adversary.state)
            state["replay"] = self.adversary.replay.state()
            state["multiplier"] = asdict(self.multiplier)
        return state

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`; the policy's weights are loaded with the model."""
        self.step = state["stage_step"]
        self.tokens = state["stage_tokens"]
        # A stage that a rule ended goes on under another rule.
        if state["stop_rule"] == self.config.stop.model_dump():
            self.stopping = Stopping(**state["stopping"])
        checkpoint.load_optimizer(self.optimizer, directory / "policy_optimizer")
        if self.adversary is not None:
            checkpoint.load_module(
                self.adversary.discriminator.module, directory / "discriminator.safetensors"
            )
            checkpoint.load_optimizer(self.adversary.optimizer, directory / "discriminator_optimizer")
            vars(self.adversary.state).update(state["adversary"])
            self.adversary.replay.load(state["replay"])
            self.multiplier = Multiplier(**state["multiplier"])


def is_held_out(example: Example, config: Config) -> bool:
    """Whether the discriminator never learns from this row: drawn by the row's number."""
    return derive_seed(config.seed, "held out", example.row) < config.discriminator.held_out_share * 2**63


def build_stage(
    config: Config,
    index: int,
    model: PreTrainedModel,
    materials: Materials,
    accelerator: Accelerator,
    *,
    start: Path | None,
) -> Stage:
    """A stage at its first step.

    Args:
        model: The policy's current weights, already on the device.
        start: Directory with the weights that the stage started from; None for the run's own start.
    """
    objective, optim = config.objective, config.optim
    optimizer = AdamW(
        model.parameters(),
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.weight_decay,
    )
    reference = None
    if objective.beta > 0:
        start_model = load_model(config.model, start).to(accelerator.device)
        reference = Policy(start_model, accelerator.autocast).requires_grad_(False)
    adversary = _build_adversary(config, model, materials, accelerator) if objective.lambda_adv > 0 else None
    policy, prepared = accelerator.prepare(Policy(model, accelerator.autocast), optimizer)
    rollout = config.rollout
    sampler = LocalSampler(
        model=model,
        stop_ids=materials.stop_ids,
        pad_id=materials.pad_id,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_rows=rollout.max_rows,
        autocast=accelerator.autocast,
    )
    if objective.uses_rollouts:
        sampler.check()
    return Stage(
        config=config,
        index=index,
        model=model,
        policy=policy,
        optimizer=prepared,
        reference=reference,
        adversary=adversary,
        sampler=sampler,
        multiplier=Multiplier(value=objective.lambda_adv),
    )


def _build_adversary(
    config: Config, model: PreTrainedModel, materials: Materials, accelerator: Accelerator
) -> Adversary:
    settings = config.discriminator
    if settings.model_name_or_path is None:
        module = BradleyTerry.copy_of(model)
    else:
        try:
            trunk = AutoModel.from_pretrained(
                settings.model_name_or_path, dtype=torch.float32, use_safetensors=True
            )
        except Exception as error:  # transformers and the Hub client raise many kinds
            raise UsageError(
                f"discriminator.model_name_or_path '{settings.model_name_or_path}' cannot be loaded: {error}"
            ) from error
        module = BradleyTerry(trunk).to(accelerator.device)
    embeddings: Any = module.trunk.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(materials.tokenizer) > rows:
        raise UsageError(
            f"the discriminator knows {rows} tokens, the policy's tokenizer has {len(materials.tokenizer)}: "
            "its backbone must share the policy's vocabulary"
        )
    module.eval()
    optimizer = AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    return Adversary(
        discriminator=BradleyTerryDiscriminator(
            module=module,
            pad_id=materials.pad_id,
            max_tokens=config.batching.max_tokens,
            autocast=accelerator.autocast,
        ),
        module=wrapped,
        optimizer=prepared,
        replay=Replay(settings.replay_size),
        state=AdversaryState(),
    )
