"""The objective and the adversary: the weights and shapes of the three forces."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from uniapl.config.section import Section


class ObjectiveConfig(Section):
    """The weights and shapes of the three forces (docs/method.md)."""

    mu_peak: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the demonstrations after the warm-up."
    )
    mu_valley: float = Field(default=0.02, ge=0, le=1, description="... after the cosine decay.")
    mu_warmup_steps: int = Field(default=0, ge=0, description="Steps from 0 to the peak.")
    mu_decay_steps: int = Field(default=50, ge=0, description="Steps of the cosine from peak to valley.")
    mu_controller: Literal["schedule", "reward", "gate"] = Field(
        default="schedule",
        description="mu by the step; mu_threshold minus the mean reward, between mu_valley and mu_peak "
        "(CHORD, appendix B.1); or per prompt: one whose rollouts all fail is learnt from its demonstration "
        "in that step (HPT), and mu is the share of such prompts.",
    )
    mu_threshold: float = Field(
        default=0.5, description="The mean reward from which on `reward` needs no demonstrations."
    )
    gate_threshold: float = Field(default=0.0, description="For `gate`, a rollout fails unless above.")
    reward_weight: float = Field(
        default=1.0, ge=0, description="Factor of the rewards' term, beside 1 - mu; 0 watches rewards only."
    )
    lambda_adv: float = Field(
        default=2.0, ge=0, description="Weight of the adversarial term; where it begins, if it is learned."
    )
    lambda_controller: Literal["fixed", "dual", "pid"] = Field(
        default="fixed",
        description="lambda_adv stays, or is learned so that the expert gap stays below max_expert_gap: by "
        "dual ascent on its logarithm (Safe RLHF), or as a PID controller (arXiv 2007.03964).",
    )
    max_expert_gap: float = Field(
        default=0.1,
        gt=0,
        lt=0.5,
        description="How far the win rate may stay below 0.5, where nobody can tell policy from expert.",
    )
    lambda_learning_rate: float = Field(default=0.5, gt=0, description="Of the dual ascent.")
    lambda_gains: tuple[float, float, float] = Field(
        default=(10.0, 0.5, 0.0), description="Kp, Ki and Kd of the PID controller."
    )
    lambda_bounds: tuple[float, float] = Field(
        default=(0.05, 20.0), description="A learned lambda stays within."
    )
    beta: float = Field(
        default=0.0, ge=0, description="Weight of the KL to a reference; 0 keeps none in memory."
    )
    reference_step: int = Field(
        default=0,
        ge=0,
        description="The KL's reference is the policy after so many steps of the stage: its start, or one "
        "that has learnt from the demonstrations. Until then there is no KL.",
    )
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="Lower (and, by default, upper) clip width.")
    epsilon_high: float | None = Field(
        default=None, gt=0, description="Upper clip width, if different (DAPO: 0.28)."
    )
    num_iterations: int = Field(default=1, ge=1, description="Policy updates per sampled batch.")
    scale_rewards: Literal["none", "group"] = Field(
        default="group",
        description="Divide advantages by the group's standard deviation (TRL's default), or not (Dr. GRPO).",
    )
    sft_token_weight: Literal["none", "is", "phi", "luffy"] = Field(
        default="none",
        description="Weight of a demonstration token by its probability p: 1, p, p(1-p), p/(p+0.1).",
    )
    adversarial_credit: Literal["win_probability", "logit", "log_sigmoid", "standardized"] = Field(
        default="win_probability",
        description="What of the discriminator's logit becomes the adversarial credit.",
    )
    adversarial_placement: Literal["loss", "reward"] = Field(
        default="loss",
        description="A term of its own, or lambda_adv times the credit is added to the reward's advantage.",
    )

    @field_validator("lambda_gains")
    @classmethod
    def _no_negative_gain(cls, gains: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(gains) < 0:
            raise ValueError("must not be negative")
        return gains

    @field_validator("lambda_bounds")
    @classmethod
    def _positive_bounds(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError("must be two numbers low <= high above 0")
        return bounds

    @model_validator(mode="after")
    def _controllers_have_room(self) -> "ObjectiveConfig":
        if self.mu_controller == "reward" and self.mu_valley >= self.mu_peak:
            raise ValueError("mu_controller 'reward' needs mu_valley below mu_peak")
        low, high = self.lambda_bounds
        learned = self.lambda_controller != "fixed" and self.lambda_adv > 0
        if learned and not low <= self.lambda_adv <= high:
            raise ValueError(f"a learned lambda_adv begins within lambda_bounds, {low:g} to {high:g}")
        return self

    @property
    def learns_from_demonstrations(self) -> bool:
        """Some step learns from demonstrations."""
        if self.mu_controller != "schedule":
            return self.mu_controller == "gate" or self.mu_peak > 0
        return self.mu_valley > 0 or (self.mu_peak > 0 and self.mu_warmup_steps + self.mu_decay_steps > 0)

    @property
    def learns_from_rewards(self) -> bool:
        """Some step learns from rewards."""
        if self.mu_controller != "schedule":
            return self.reward_weight > 0
        constant = self.mu_warmup_steps + self.mu_decay_steps == 0
        below_one = self.mu_valley < 1 or (not constant and (self.mu_peak < 1 or self.mu_warmup_steps > 0))
        return below_one and self.reward_weight > 0

    @property
    def uses_rollouts(self) -> bool:
        """Some step needs sampled answers."""
        acting = self.learns_from_rewards or self.lambda_adv > 0 or self.beta > 0
        return acting or self.mu_controller != "schedule"

    @property
    def clip_high(self) -> float:
        """The upper clip width in force."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class DiscriminatorConfig(Section):
    """What tells the expert's answers from the policy's."""

    kind: Literal["bradley-terry", "polar", "remote", "density-ratio"] = Field(
        default="bradley-terry",
        description="Co-trained on pairs; or frozen: a POLAR reward model, the same behind a server, or the "
        "log-likelihood ratio of a model that was fine-tuned on the demonstrations.",
    )
    model_name_or_path: str | None = Field(
        default=None,
        description="bradley-terry: a backbone with the policy's vocabulary, by default a copy of the "
        "policy's start; polar and remote: the reward model; density-ratio: the model that was fine-tuned on "
        "the demonstrations.",
    )
    lora_r: int | None = Field(
        default=None,
        ge=1,
        description="Of bradley-terry: no copy, but adapters of this rank on the policy's own weights; one "
        "backbone in memory.",
    )
    in_context_demonstration: bool = Field(
        default=False,
        description="Of bradley-terry: it first reads another prompt and its demonstration, as an example.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with it, as POLAR's own models need."
    )
    url: str | None = Field(default=None, description="Of remote: the server, http://host:port.")
    server: Literal["vllm", "sglang"] = Field(default="vllm", description="Of remote: what runs there.")
    timeout: float = Field(default=60.0, gt=0, description="Of remote: seconds for one try of a request.")
    max_retries: int = Field(default=3, ge=0, description="Of remote: further tries, then the run ends.")
    density_ratio_reference: Literal["start", "policy"] = Field(
        default="start", description="Of density-ratio: the stage's start, or the policy as it is now."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Of its own AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Of its own AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Its gradient is clipped to this norm.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs taken to be the wrong way round."
    )
    warmup_steps: int = Field(
        default=10, ge=0, description="First steps: it learns, the policy does not feel it."
    )
    updates_per_step: int = Field(default=2, ge=1, description="Its updates per policy step.")
    replay_fraction: float = Field(
        default=0.5, ge=0, lt=1, description="Share of older groups in each of its updates."
    )
    replay_size: int = Field(default=256, ge=0, description="Groups that are kept for replay.")
    held_out_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the demonstrations that it never learns from, to see whether it knows the "
        "expert or only the demonstrations.",
    )
    freeze_after_steps: int | None = Field(
        default=None, ge=1, description="From this step of the stage on it learns no more; None: always."
    )
    min_accuracy: float = Field(
        default=0.55,
        ge=0,
        le=1,
        description="While its accuracy on fresh pairs is below, lambda is 0: it only guesses.",
    )
    accuracy_band: tuple[float, float] = Field(
        default=(0.85, 0.95),
        description="Paused when its accuracy on fresh pairs passes the upper end, until the lower.",
    )

    @field_validator("accuracy_band")
    @classmethod
    def _ordered(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] <= band[1] <= 1:
            raise ValueError("must be two numbers low <= high between 0 and 1")
        return band
