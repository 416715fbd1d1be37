"""The whole configuration: strict, frozen, the same keys in YAML, on the command line and from Python.

Keys are TRL's wherever TRL has one. A method is a setting of numbers, never a branch: `uniapl.methods` says
which values a method fixes and which it only proposes.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(_Section):
    """The policy's start."""

    model_name_or_path: str | None = Field(
        default=None, description="Directory or Hub id of a causal language model."
    )
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub model.")
    attn_implementation: str | None = Field(default=None, description="As in transformers: sdpa, eager, ...")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class DataConfig(_Section):
    """Rows with `prompt` and optionally `completion`, or with `messages`; other columns go to the rewards."""

    path: str | None = Field(
        default=None, description="A .jsonl, .json, .csv or .parquet file, or a Hub data set id."
    )
    split: str = Field(default="train", description="Split of a Hub data set.")
    columns: dict[str, str] = Field(
        default={}, description="Renames columns: {theirs: ours}, e.g. {problem: prompt}."
    )
    string_prompts: Literal["text", "chat"] = Field(
        default="text", description="A prompt that is a string is used as it is, or as a user's chat message."
    )
    system_prompt: str | None = Field(
        default=None, description="System message for chat prompts that have none."
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        default={}, description="Arguments of the chat template, e.g. {enable_thinking: false} for Qwen3."
    )
    max_prompt_length: int | None = Field(
        default=None, gt=0, description="Rows with a longer prompt are left out."
    )
    max_demonstration_length: int | None = Field(
        default=None,
        gt=1,
        description="Longer demonstrations are left out: half an answer teaches never to stop.",
    )


class RolloutConfig(_Section):
    """How answers are sampled."""

    num_generations: int = Field(default=8, ge=2, description="Rollouts per prompt (TRL's default).")
    max_completion_length: int = Field(default=256, ge=1, description="New tokens per rollout at most.")
    temperature: float = Field(default=1.0, gt=0, description="Of sampling, and of the loss on rollouts.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling; log-probs stay those of the whole distribution.",
    )
    top_k: int = Field(
        default=0, ge=0, description="Sample among the k likeliest tokens, 0: all; log-probs as for top_p."
    )
    max_rows: int = Field(default=256, ge=1, description="Rows that are decoded at the same time.")


class RewardFunctionConfig(_Section):
    """One reward function."""

    name: str = Field(description="Registry name, `module:function` or `path.py:function`.")
    weight: float = Field(default=1.0, description="Factor in the sum over functions.")
    args: dict[str, bool | int | float | str] = Field(
        default={}, description="Keyword arguments bound to it."
    )


class RewardsConfig(_Section):
    """How answers are scored."""

    functions: tuple[RewardFunctionConfig, ...] = Field(
        default=(), description="Names, or {name, weight, args}."
    )
    timeout: float | None = Field(
        default=60.0,
        gt=0,
        description="Seconds for one call of one function; None calls it in the main thread.",
    )

    @field_validator("functions", mode="before")
    @classmethod
    def _names_are_enough(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"name": item} if isinstance(item, str) else item for item in value)
        return value


class ObjectiveConfig(_Section):
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
    gate_reward: float = Field(default=0.0, description="For `gate`, a rollout fails unless above.")
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
        default=0.0, ge=0, description="Weight of the KL to the stage's start (TRL's default)."
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
    adversarial_assignment: Literal["win_probability", "logit", "log_sigmoid", "standardized"] = Field(
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


class DiscriminatorConfig(_Section):
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
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Of bradley-terry: no copy, but adapters of this rank on the policy's own weights; one "
        "backbone in memory.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with it, as POLAR's own models need."
    )
    url: str | None = Field(default=None, description="Of remote: the server, http://host:port.")
    server: Literal["vllm", "sglang"] = Field(default="vllm", description="Of remote: what runs there.")
    timeout: float = Field(default=60.0, gt=0, description="Of remote: seconds for one try of a request.")
    max_retries: int = Field(default=3, ge=0, description="Of remote: further tries, then the run ends.")
    against: Literal["start", "policy"] = Field(
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
    replay_share: float = Field(
        default=0.5, ge=0, lt=1, description="Share of older groups in each of its updates."
    )
    replay_size: int = Field(default=256, ge=0, description="Groups that are kept for replay.")
    held_out_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the demonstrations that it never learns from, to see whether it knows the "
        "expert or only the demonstrations.",
    )
    freeze_step: int | None = Field(
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


class OptimConfig(_Section):
    """The policy's AdamW."""

    learning_rate: float = Field(default=1e-6, gt=0, description="TRL's default for GRPO.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, as in AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the gradient's average.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of its square's average.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient is clipped to this norm.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="After the warm-up: stay, or fall to 0 by the last step."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up of the learning rate.")
    bf16: bool | None = Field(default=None, description="bf16 autocast; by default on GPUs, not on CPUs.")


class BatchingConfig(_Section):
    """What one step holds and how it is cut; the loss does not depend on the cut."""

    prompts_per_step: int = Field(default=8, ge=1, description="Prompts that are sampled in each step.")
    demonstrations_per_step: int = Field(default=8, ge=1, description="Demonstrations in each step.")
    per_device_train_batch_size: int | None = Field(
        default=None, ge=1, description="Rows of a micro-batch at most; by default only the tokens count."
    )
    max_tokens: int = Field(
        default=16384, ge=1, description="Padded tokens of a micro-batch at most, one row at least."
    )


class HealthConfig(_Section):
    """When a run warns, and when it stops by itself (exit code 3)."""

    max_skipped_steps: int = Field(
        default=5,
        ge=1,
        description="Steps in a row with a non-finite gradient, or with a reward that failed every call.",
    )
    window: int = Field(
        default=10, ge=2, description="Steps whose means are compared with as many before, for warnings."
    )


class StopConfig(_Section):
    """When a stage ends before its last step; the reason stands in the metrics as `stop/reason`."""

    metric: str = Field(
        default="reward",
        description="What `target` and `patience` watch: any number in metrics.jsonl but times.",
    )
    greater_is_better: bool = Field(default=True, description="Whether more of it is better.")
    target: float | None = Field(default=None, description="End once the metric is at least as good.")
    patience: int | None = Field(
        default=None, ge=1, description="End after so many values in a row that are no better than the best."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="End once the stage has learnt from so many tokens of completions."
    )


Method = Literal["sft", "a-sft", "grpo", "a-grpo", "chord-mu", "chord-phi", "uniapl", "gad"]


class Config(_Section):
    """A run of UniAPL."""

    method: Method = Field(
        default="uniapl", description="Which forces act; fixes or proposes values of `objective`."
    )
    output_dir: str = Field(default="runs/uniapl", description="The run directory.")
    overwrite: bool = Field(default=False, description="Replace a run that is already in output_dir.")
    resume: str = Field(
        default="never", description="never, auto (newest whole checkpoint), or a checkpoint's path."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of every random draw.")
    max_steps: int = Field(default=100, ge=1, description="Steps; with stages, each stage's own count holds.")
    save_steps: int = Field(
        default=50, ge=1, description="Steps between checkpoints; the last step is always saved."
    )
    save_total_limit: int = Field(default=2, ge=1, description="Checkpoints that are kept.")
    logging_steps: int = Field(
        default=1, ge=1, description="Steps between lines on the console; files get every step."
    )
    gradient_steps: int = Field(
        default=0,
        ge=0,
        description="Steps between measurements of each force's own gradient, which cost a forward and a "
        "backward pass per force; 0: never.",
    )
    stages: tuple[dict[str, Any], ...] = Field(
        default=(), description="A pipeline: each with its `method`, `max_steps` and changes to any section."
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optim: OptimConfig = OptimConfig()
    batching: BatchingConfig = BatchingConfig()
    health: HealthConfig = HealthConfig()
    stop: StopConfig = StopConfig()
