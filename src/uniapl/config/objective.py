"""The sections `objective` and `discriminator`: weights and shapes of the loss components."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from uniapl.config.section import FractionInterval, PathText, PositiveInterval, Section

MAX_RATIO_OF_CISPO = 5.0
"""Default of `epsilon_high` with loss_type cispo: the value of ScaleRL (arXiv 2510.13786)."""


class ObjectiveConfig(Section):
    """Weights and shapes of the loss components: demonstrations, rewards, adversary and KL."""

    mu_peak: float = Field(default=0.5, ge=0, le=1)
    """Weight mu of the demonstrations in the cold start and after the warm-up; the rewards' weight is
    1 - mu."""
    mu_valley: float = Field(default=0.02, ge=0, le=1)
    """Weight mu of the demonstrations after the cosine decay."""
    mu_warmup_steps: int = Field(default=0, ge=0)
    """Steps after the cold start in which mu rises linearly from 0 to mu_peak; 0 starts at mu_peak."""
    mu_decay_steps: int = Field(default=50, ge=0)
    """Steps of the cosine decay from mu_peak to mu_valley; 0 drops to mu_valley without a decay."""
    mu_controller: Literal["schedule", "reward", "gate"] = "schedule"
    """schedule sets mu by the step; reward sets it to mu_threshold minus the mean reward, between mu_valley
    and mu_peak (CHORD, appendix B.1); gate applies per prompt: a prompt whose rollouts all fail is trained on
    its demonstration in that step (HPT), and mu is the fraction of such prompts."""
    mu_threshold: float = 0.5
    """Threshold from which the mean reward is subtracted to get mu (mu_controller: reward)."""
    gate_threshold: float = 0.0
    """A rollout fails if its reward does not exceed this value (mu_controller: gate)."""
    reward_weight: float = Field(default=1.0, ge=0)
    """Factor of the rewards' loss component in addition to 1 - mu; 0 only logs the rewards."""
    lambda_adv: float = Field(default=2.0, ge=0)
    """Weight of the adversarial loss, or the exponent of u (adversarial_placement: multiply); the initial
    value if lambda_controller adapts it. 0 disables the adversary."""
    lambda_controller: Literal["fixed", "dual", "pid"] = "fixed"
    """fixed keeps lambda_adv; dual and pid adapt it so that the expert gap stays below max_expert_gap, by
    dual ascent on log lambda (Safe RLHF) or with a PID controller (arXiv 2007.03964)."""
    max_expert_gap: float = Field(default=0.1, gt=0, lt=0.5)
    """Maximum distance of the win rate below 0.5, at which policy and expert cannot be distinguished."""
    lambda_learning_rate: float = Field(default=0.5, gt=0)
    """Learning rate of the dual ascent on log lambda."""
    lambda_gains: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (10.0, 0.5, 0.0)
    """Gains Kp, Ki and Kd of the PID controller."""
    lambda_bounds: PositiveInterval = (0.05, 20.0)
    """Lower and upper bound of an adapted lambda."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to a reference model; 0 disables it and keeps no reference in memory."""
    reference_step: int | None = Field(default=None, ge=0)
    """Step of the stage whose policy is the reference; no KL applies before it. 0 uses the initial policy,
    null the policy at the end of the cold start."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip width of the ratio, and the upper one if epsilon_high is null."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip width of the ratio (DAPO: 0.28); null uses epsilon. With loss_type cispo the largest ratio,
    at least 1; null uses 5.0 (ScaleRL)."""
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo", "cispo"] = "dapo"
    """Loss of the rollouts, for rewards, adversary and KL; demonstrations are always averaged over their
    tokens. dapo averages over all tokens of the step, grpo over the tokens of each completion and then over
    completions; dr_grpo divides by the number of completions times rollout.max_completion_length; bnpo equals
    dapo, because micro-batches do not affect the loss. cispo limits the ratio by epsilon_high and keeps the
    gradient of every token, averaged as in dapo."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own ratio, or all tokens of a completion have their geometric mean (GSPO,
    which uses loss_type grpo)."""
    mask_truncated_completions: bool = False
    """Leave completions that reached the length limit out of the loss; their rewards still count in the
    advantages of the others (DAPO)."""
    teacher_kl: float = Field(default=0.0, ge=0)
    """Weight of the reverse KL from the policy to a teacher on the rollouts (on-policy distillation; section
    teacher); 0 uses no teacher."""
    pref_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on preference pairs (DPO), in which a demonstration is preferred to another
    completion of its prompt; 0 uses no pairs."""
    pref_pairs: Literal["rollouts", "rejected"] = "rollouts"
    """rollouts pairs the demonstration of a sampled prompt with those of its rollouts that do not pass
    (pass_reward, pass_threshold), or with all of them if no reward applies to the prompt (SPIN); rejected
    pairs `chosen` and `rejected` of the demonstrations' rows, without rollouts (DPO)."""
    beta_pref: float = Field(default=0.1, gt=0)
    """Factor of the pairs' log-ratios to the reference (TRL's beta in DPOConfig)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the bonus for the mean entropy of the rollout tokens; 0 disables it."""
    num_iterations: int = Field(default=1, ge=1)
    """Policy updates per sampled batch."""
    scale_rewards: Literal["none", "group", "batch"] = "group"
    """group divides advantages by the group's standard deviation, as TRL does; batch by that of all rewards
    of the step; none does not divide (Dr. GRPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """sum_then_normalize adds the weighted reward functions and then computes advantages; normalize_then_sum
    normalizes each function within its group, adds the results with their weights, and divides by the
    standard deviation over the step (GDPO)."""
    sft_token_weight: Literal["none", "is", "phi", "luffy"] = "none"
    """Weight of a demonstration token with probability p: none is 1, is p, phi p(1-p), luffy p/(p+0.1)."""
    adversarial_credit: Literal["win_probability", "logit", "log_sigmoid", "standardized"] = "win_probability"
    """Function of the discriminator's logit that is the adversarial credit of a rollout."""
    adversarial_placement: Literal["loss", "reward", "multiply"] = "loss"
    """loss gives the credit its own loss component; reward adds lambda_adv * credit to the advantage;
    multiply multiplies the reward by u ** lambda_adv, u the probability that the completion is the expert's,
    so that a completion without a reward gains nothing by its style."""
    pass_threshold: float = 1.0
    """A completion passes if its reward is at least this. Completions that do not pass keep at most half of
    their reward (adversarial_placement: multiply); pass rates also use it (batching.prompt_selection)."""
    pass_reward: str | None = None
    """Reward function whose value decides whether a completion passes; null takes the first one that applies
    to the prompt."""

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _as_trl_reads_it(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _loss_is_consistent(self) -> "ObjectiveConfig":
        if self.loss_type == "cispo" and self.clip_high < 1:
            raise ValueError(
                "with loss_type 'cispo', epsilon_high is the largest ratio itself and must be at least 1, "
                f"not {self.clip_high:g}; null uses {MAX_RATIO_OF_CISPO:g}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ValueError(
                "multi_objective_aggregation 'normalize_then_sum' divides by the deviations of the group and "
                "of the step: remove scale_rewards"
            )
        return self

    @model_validator(mode="after")
    def _controllers_have_a_range(self) -> "ObjectiveConfig":
        if self.mu_controller == "reward" and self.mu_valley >= self.mu_peak:
            raise ValueError("mu_controller 'reward' needs mu_valley below mu_peak")
        if self.mu_controller == "gate" and self.pairs_rejected:
            raise ValueError(
                "pref_pairs 'rejected' needs demonstrations in every step, and mu_controller 'gate' draws "
                "none: set pref_pairs to rollouts, or use another mu_controller"
            )
        low, high = self.lambda_bounds
        adapted = self.lambda_controller != "fixed" and self.lambda_adv > 0
        if adapted and not low <= self.lambda_adv <= high:
            raise ValueError(f"an adapted lambda_adv must be within lambda_bounds, {low:g} to {high:g}")
        return self

    @property
    def learns_from_demonstrations(self) -> bool:
        """Whether any step after the cold start draws demonstrations."""
        return self.imitates or self.pairs_rejected

    @property
    def imitates(self) -> bool:
        """Whether any step after the cold start trains on demonstrations with the SFT loss."""
        if self.mu_controller != "schedule":
            return self.mu_controller == "gate" or self.mu_peak > 0
        return self.mu_valley > 0 or (self.mu_peak > 0 and self._mu_changes)

    @property
    def learns_from_rewards(self) -> bool:
        """Whether any step trains on rewards."""
        if self.mu_controller != "schedule":
            return self.reward_weight > 0
        below_one = self.mu_valley < 1 or (
            self._mu_changes and (self.mu_peak < 1 or self.mu_warmup_steps > 0)
        )
        return below_one and self.reward_weight > 0

    @property
    def _mu_changes(self) -> bool:
        return self.mu_warmup_steps + self.mu_decay_steps > 0

    @property
    def uses_rollouts(self) -> bool:
        """Whether any step samples completions."""
        weights = (self.lambda_adv, self.beta, self.teacher_kl, self.entropy_coef, self.pairs_rollouts)
        return self.learns_from_rewards or any(weights) or self.mu_controller != "schedule"

    @property
    def pairs_rollouts(self) -> bool:
        """Whether rollouts are compared with the demonstrations of their prompts."""
        return self.pref_weight > 0 and self.pref_pairs == "rollouts"

    @property
    def pairs_rejected(self) -> bool:
        """Whether the data's rejected completions are compared with the demonstrations."""
        return self.pref_weight > 0 and self.pref_pairs == "rejected"

    @property
    def uses_reference(self) -> bool:
        """Whether a loss component needs the KL reference."""
        return self.beta > 0 or self.pref_weight > 0

    @property
    def clip_high(self) -> float:
        """The upper clip width, or the largest ratio of cispo, with its default filled in."""
        default = MAX_RATIO_OF_CISPO if self.loss_type == "cispo" else self.epsilon
        return default if self.epsilon_high is None else self.epsilon_high


LEARNING_RATE_OF_COPY = 1e-5
"""Default of `discriminator.learning_rate` for a copy or adapters of the model (GAD)."""
LEARNING_RATE_OF_HEAD = 1e-3
"""The same for the head, whose weights are new: with 1e-5 it learns too slowly to guard (docs/log.md)."""
MISMATCHED_OF_HEAD = 3
"""Default of `mismatched_demonstrations` for the head. Our choice."""


KEYS_OF_KINDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("reference-likelihood",): ("likelihood_scale",),
    ("head",): ("layers", "log_probability_features"),
    ("bradley-terry",): ("lora_r", "num_layers", "in_context_demonstration", "label_smoothing"),
    ("head", "bradley-terry"): (
        *("learning_rate", "weight_decay", "max_grad_norm", "loss", "mismatched_demonstrations"),
        *("warmup_steps", "updates_per_step", "replay_fraction", "replay_size", "held_out_fraction"),
        *("freeze_after_steps", "accuracy_band"),
    ),
    ("remote",): ("url", "server", "timeout", "max_retries"),
    ("density-ratio",): ("density_ratio_reference",),
}
"""Kinds of discriminators -> keys of `discriminator` that only these use."""


class DiscriminatorConfig(Section):
    """The discriminator, which distinguishes the expert's completions from the policy's."""

    kind: Literal["reference-likelihood", "head", "bradley-terry", "polar", "remote", "density-ratio"] = (
        "reference-likelihood"
    )
    """Kind of discriminator. reference-likelihood is the mean log-probability under the KL reference and is
    not trained. head is a small network on the hidden states of the KL reference, and bradley-terry a copy of
    the model; both are trained during the run. The others are frozen: polar is a POLAR reward model, remote
    one on a server, density-ratio the likelihood ratio of a fine-tuned model."""
    layers: tuple[int, ...] = ()
    """Decoder layers of the reference, from 1, whose states the head reads (kind: head); empty reads one at
    two thirds of the depth."""
    log_probability_features: bool = True
    """Give the head each token's log-probability under the reference, in addition to its states (kind:
    head)."""
    likelihood_scale: float = Field(default=4.0, gt=0)
    """Logit per nat of mean log-probability (kind: reference-likelihood)."""
    model_name_or_path: PathText | None = None
    """Model: a backbone with the policy's vocabulary (bradley-terry; null copies the initial policy), the
    reward model (polar, remote), or the model fine-tuned on the demonstrations (density-ratio)."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of LoRA adapters on the policy's weights (kind: bradley-terry); null trains a second copy of
    them."""
    num_layers: int | None = Field(default=None, ge=1)
    """Decoder layers of the copy, from the first (kind: bradley-terry); null copies all. Fewer layers take
    less time and memory."""
    in_context_demonstration: bool = False
    """Put another prompt and its demonstration before the input, as an example (kind: bradley-terry)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, which POLAR's own models need."""
    url: str | None = None
    """URL of the discriminator server, http://host:port (kind: remote)."""
    server: Literal["vllm", "sglang"] = "vllm"
    """Software of the discriminator server (kind: remote)."""
    timeout: float = Field(default=60.0, gt=0)
    """Timeout of one request to the discriminator server, in seconds (kind: remote)."""
    max_retries: int = Field(default=3, ge=0)
    """Retries of a failed request before the run ends; 0 never retries (kind: remote)."""
    density_ratio_reference: Literal["start", "policy"] = "start"
    """Denominator of the ratio: the stage's initial policy, or the current one (kind: density-ratio)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the discriminator's AdamW; null uses 1e-5 (kind: bradley-terry) or 1e-3 (kind: head,
    whose weights are new)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the discriminator's AdamW; norms and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the discriminator's gradient to this norm."""
    loss: Literal["paired", "unpaired"] | None = None
    """paired compares a demonstration with the rollouts of the same prompt (Bradley-Terry); unpaired
    distinguishes demonstrations, which are drawn from all, from the rollouts of any prompt (logistic loss).
    null uses paired (kind: bradley-terry) or unpaired (kind: head, which has no other loss)."""
    mismatched_demonstrations: int | None = Field(default=None, ge=0)
    """Demonstrations of other prompts that are negatives for each prompt, so that the discriminator learns
    which completions answer the prompt; null uses 3 (kind: head) or 0 (kind: bradley-terry)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Fraction of pairs that the loss assumes to be labeled incorrectly (loss: paired)."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps at the start of the stage in which the discriminator is trained and lambda is 0."""
    updates_per_step: int = Field(default=2, ge=1)
    """Discriminator updates per policy step."""
    replay_fraction: float = Field(default=0.5, ge=0, lt=1)
    """Fraction of groups from earlier steps in each discriminator update; 0 uses only new groups."""
    replay_size: int = Field(default=256, ge=0)
    """Groups that are kept for replay; 0 keeps none."""
    held_out_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of demonstrations reserved to measure the discriminator's generalization; 0 trains on all."""
    freeze_after_steps: int | None = Field(default=None, ge=1)
    """Stop training the discriminator after this many steps with rollouts; null trains it throughout."""
    min_accuracy: float = Field(default=0.55, ge=0, le=1)
    """Set lambda to 0 until the discriminator's accuracy on new pairs reaches this, and again when it has
    fallen 0.05 below; 0 never sets it to 0."""
    accuracy_band: FractionInterval = (0.85, 0.95)
    """Pause the discriminator's training when its accuracy on new pairs exceeds the upper bound, until it is
    below the lower bound."""

    @property
    def is_trained(self) -> bool:
        """Whether it is trained during the run."""
        return self.kind in ("bradley-terry", "head")

    @property
    def unused_keys(self) -> dict[str, tuple[str, ...]]:
        """Keys with another value than their default that this kind does not use -> the kinds that do."""
        fields = type(self).model_fields
        return {
            key: kinds
            for kinds, keys in KEYS_OF_KINDS.items()
            for key in keys
            if self.kind not in kinds and getattr(self, key) != fields[key].default
        }

    @property
    def reads_reference(self) -> bool:
        """Whether it reads the KL reference, and therefore has no logit before that exists."""
        return self.kind in ("head", "reference-likelihood")

    @property
    def is_paired(self) -> bool:
        """Whether the loss compares completions of the same prompt."""
        return self.kind == "bradley-terry" and self.loss != "unpaired"

    @property
    def trained_learning_rate(self) -> float:
        """`learning_rate`, with its default filled in."""
        default = LEARNING_RATE_OF_HEAD if self.kind == "head" else LEARNING_RATE_OF_COPY
        return self.learning_rate if self.learning_rate is not None else default

    @property
    def num_mismatched(self) -> int:
        """`mismatched_demonstrations`, with its default filled in."""
        if self.mismatched_demonstrations is not None:
            return self.mismatched_demonstrations
        return MISMATCHED_OF_HEAD if self.kind == "head" else 0
