"""The numbers of a stage that change from step to step: loss weights and learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from uniapl.config import Config
from uniapl.functional import (
    Multiplier,
    dual_ascent,
    expert_gap,
    pid,
    reward_threshold,
    warmup_cosine,
)
from uniapl.training.adversary import Adversary
from uniapl.training.monitor.early_stopping import Stopping
from uniapl.training.optimizer import learning_rates
from uniapl.training.state_adversary import StateAdversary
from uniapl.training.update.credit import failed_groups
from uniapl.types import RolloutGroup


@dataclass(kw_only=True)
class Schedule:
    """Position of a stage, and the values that follow from it."""

    config: Config
    adversary: Adversary | StateAdversary | None
    multiplier: Multiplier
    """lambda_adv, fixed or learned."""
    step: int = 0
    """Finished steps of the stage."""
    completion_tokens: int = 0
    """Completion tokens that the stage has trained on."""
    rollouts: int = 0
    """Rollouts that the stage has sampled, with those that were replaced."""
    uses_reference: bool = False
    """The KL term has its reference: `reference_step` is reached."""
    stopping: Stopping = field(default_factory=Stopping)

    @property
    def ended(self) -> bool:
        """The last step is finished, or an early-stopping rule ended the stage."""
        return self.step >= self.config.max_steps or self.stopping.reason is not None

    @property
    def in_cold_start(self) -> bool:
        """The current step belongs to the cold start."""
        return self.step < self.config.cold_start_steps

    @property
    def imitates(self) -> bool:
        """The current step trains on demonstrations with the SFT loss."""
        objective = self.config.objective
        return objective.mu_peak > 0 if self.in_cold_start else objective.imitates

    @property
    def learning_rate(self) -> float:
        """The policy's learning rate. The cold start and the steps after it have a curve each."""
        cold = self.config.cold_start_steps
        begin, end = (0, cold) if self.step < cold else (cold, self.config.max_steps)
        return learning_rates(self.config.optim, end - begin)(self.step - begin)

    def prompts_per_step(self, step: int) -> int:
        """Prompts of a step of the stage."""
        batching = self.config.batching
        cold = step < self.config.cold_start_steps
        return batching.cold_start_prompts_per_step if cold else batching.prompts_per_step

    @property
    def demonstrations_per_step(self) -> int:
        """Demonstrations of the current step."""
        config = self.config
        cold, later = config.cold_start_demonstrations_per_step, config.batching.demonstrations_per_step
        return cold if self.in_cold_start else later

    @property
    def lambda_adv(self) -> float:
        """The adversary's weight; 0 before its first step, and while it is not accurate."""
        if self.adversary is None or self.step < self.config.adversary_step:
            return 0.0
        objective = self.config.objective
        # gad: no other component has a gradient.
        only_component = not (
            objective.learns_from_rewards
            or self.config.learns_from_demonstrations
            or objective.teacher_kl
            or objective.pref_weight
        )
        return self.multiplier.value if self.adversary.state.accurate or only_component else 0.0

    def mu(self, groups: Sequence[RolloutGroup], discarded: Sequence[RolloutGroup] = ()) -> float:
        """The demonstrations' weight, which may depend on the rewards of the step's rollouts.

        Args:
            discarded: Groups that were sampled and replaced. The mean reward is that of all sampled groups,
                because those that are kept never have only good or only bad rewards.
        """
        objective = self.config.objective
        if self.in_cold_start:
            return objective.mu_peak
        if objective.mu_controller == "gate":
            return len(failed_groups(groups, objective.gate_threshold)) / len(groups)
        if objective.mu_controller == "reward":
            sampled = [*groups, *discarded]
            rewards = [reward for group in sampled for reward in group.rewards if reward is not None]
            if not rewards:
                return objective.mu_peak
            return reward_threshold(
                sum(rewards) / len(rewards),
                threshold=objective.mu_threshold,
                peak=objective.mu_peak,
                valley=objective.mu_valley,
            )
        return warmup_cosine(
            self.step - self.config.cold_start_steps,
            warmup_steps=objective.mu_warmup_steps,
            decay_steps=objective.mu_decay_steps,
            peak=objective.mu_peak,
            valley=objective.mu_valley,
        )

    def weights(
        self, groups: Sequence[RolloutGroup], discarded: Sequence[RolloutGroup] = ()
    ) -> dict[str, float]:
        """The weight of each loss component; see :meth:`mu`."""
        objective, mu = self.config.objective, self.mu(groups, discarded)
        return {
            "sft": mu,
            "rl": (1 - mu) * objective.reward_weight,
            "adv": self.lambda_adv if objective.adversarial_placement == "loss" else 0.0,
            "kl": objective.beta if self.uses_reference else 0.0,
            "teacher": objective.teacher_kl,
            "pref": objective.pref_weight if self.uses_reference else 0.0,
            "entropy": -objective.entropy_coef,
        }

    def control_lambda(self, win_rate: float | None) -> dict[str, float]:
        """Update a learned lambda_adv by the mean win rate of the step's pairs; return what to log.

        Only pairs count, because without a demonstration the win rate has no calibrated zero. lambda_adv does
        not change while its weight is 0: a discriminator at chance level sees no gap.

        Args:
            win_rate: None if the step has no pairs.
        """
        objective = self.config.objective
        if win_rate is None or objective.lambda_controller == "fixed":
            return {}
        # Not the expert gap, which ends at 0: lambda must fall as fast at a win rate above 0.5 as it grows
        # below. The constraint is the same.
        violation = 0.5 - win_rate - objective.max_expert_gap
        if self.lambda_adv > 0:
            bounds = objective.lambda_bounds
            if objective.lambda_controller == "dual":
                rate = objective.lambda_learning_rate
                self.multiplier = dual_ascent(self.multiplier, violation, learning_rate=rate, bounds=bounds)
            else:
                self.multiplier = pid(self.multiplier, violation, gains=objective.lambda_gains, bounds=bounds)
        return {
            "constraint/expert_gap": expert_gap(win_rate),
            "constraint/violation": violation,
            "constraint/multiplier": self.multiplier.value,
        }
