"""The whole configuration: strict, frozen, with the same keys in YAML, as flags and in Python.

Keys are TRL's wherever TRL has one. The docstring of a key is its description in `--help-all`.
"""

from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from uniapl.config.batching import BatchingConfig
from uniapl.config.evaluation import EvaluationConfig
from uniapl.config.health import HealthConfig
from uniapl.config.objective import DiscriminatorConfig, ObjectiveConfig
from uniapl.config.rollout import RolloutConfig
from uniapl.config.section import Names, PathText, Section, Texts
from uniapl.config.teacher import TeacherConfig
from uniapl.untyped import is_dict, is_sequence


class ModelConfig(Section):
    """The model that is trained."""

    model_name_or_path: PathText | None = None
    """Directory or Hub id of a causal language model."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model; null uses the default branch."""
    attn_implementation: str | None = None
    """Attention implementation of transformers, such as sdpa or eager; null lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_path: PathText | None = None
    """Jinja file or tokenizer whose chat template is used; a tokenizer is a directory or a Hub id. The
    template is saved with the model. null keeps that of the model's tokenizer."""
    stop_tokens: Texts = ()
    """More tokens that end a completion, such as <|im_end|>; the end tokens in the model's files always do.
    Sampling stops there, demonstrations are cut there, and they are written into the saved model's
    generation_config.json."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of a LoRA adapter that is trained; null trains all weights of the model."""
    lora_alpha: int | None = Field(default=None, ge=1)
    """Scale the adapter's output by lora_alpha / lora_r; null scales it by 2."""
    lora_target_modules: Names = Field(default=("all-linear",), min_length=1)
    """Layers that get an adapter, by the ends of their names; all-linear selects all except the head."""

    @model_validator(mode="after")
    def _adapter_keys_need_a_rank(self) -> "ModelConfig":
        if self.lora_r is None and (self.lora_alpha or self.lora_target_modules != ("all-linear",)):
            raise ValueError("lora_alpha and lora_target_modules need lora_r, the rank of the adapter")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise ValueError("lora_target_modules: 'all-linear' cannot be combined with other names")
        return self


class DataConfig(Section):
    """Rows with `prompt` and optionally `completion`, or with `messages`; rewards get the other columns."""

    path: PathText | tuple[PathText, ...] | None = None
    """Hub dataset id, or a file (.jsonl, .json, .csv, .tsv, .parquet, or .gz of a text file), a pattern such
    as data/*.jsonl, or a list of files."""
    name: str | None = None
    """Configuration of a Hub dataset, such as main for openai/gsm8k; null uses its default one."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null uses the default branch."""
    split: str = "train"
    """Split of a Hub dataset."""
    columns: dict[str, str] = Field(default={})
    """Columns to rename, as {old name: new name}, such as {problem: prompt}. Reward functions get a renamed
    column under both names."""
    prompt_format: Literal["text", "chat"] = "text"
    """How string prompts are used; text keeps them verbatim, chat makes each one a user message."""
    system_prompt: str | None = None
    """System message for chat prompts that have none; null adds none."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the chat template, such as {enable_thinking: false} for Qwen3. A row's column
    `chat_template_kwargs` takes precedence."""
    train_on: Literal["last", "all"] = "last"
    """Assistant turns of a conversation that the SFT loss covers; all adds the turns before the last one.
    Rollouts and the discriminator always concern the last one."""
    max_prompt_length: int | None = Field(default=None, gt=0)
    """Leave out rows whose prompt has more tokens than this; null keeps all that fit the context window."""
    max_demonstration_length: int | None = Field(default=None, gt=1)
    """Leave out rows whose demonstration has more tokens than this; null keeps all that fit the context
    window. (A truncated demonstration would train the policy not to stop.)"""


class RewardFunctionConfig(Section):
    """One reward function."""

    name: PathText
    """Name of a registered function, `module:function` or `path.py:function`."""
    weight: float = 1.0
    """Weight in the sum over all functions."""
    args: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of every call."""


class RewardsConfig(Section):
    """Scoring of completions."""

    functions: tuple[RewardFunctionConfig, ...] = ()
    """Reward functions, by name or as {name, weight, args}."""
    timeout: float | None = Field(default=60.0, gt=0)
    """Timeout of a call to a function, in seconds; null sets no limit (main thread, unless async)."""
    allow_code_verifiers: bool = False
    """Run verifier functions that the data contains as Python source, in a sandbox (Linux only)."""

    @field_validator("functions", mode="before")
    @classmethod
    def _from_names(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str) or is_dict(value) else value
        if is_sequence(items):
            return tuple({"name": item} if isinstance(item, str) else item for item in items)
        return value


class OptimConfig(Section):
    """AdamW for the policy."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Learning rate of the policy (TRL's default for GRPO)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases have none, as in transformers."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the gradient's moving average."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of the squared gradient's moving average."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the gradient to this norm."""
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "constant"
    """Learning rate after the warm-up, by the names of transformers; linear and cosine decay to 0 at the last
    step of the stage."""
    lr_scheduler_kwargs: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the schedule, such as {min_lr_rate: 0.1} for cosine_with_min_lr."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate; 0 starts at the full rate."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the stage's steps that are its warm-up, in place of warmup_steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the update's backward pass, which saves memory and costs a third more compute.
    Sampling keeps its cache."""
    bf16: bool | None = None
    """Use bf16 autocast; null uses it on GPUs and not on CPUs."""

    @field_validator("lr_scheduler_kwargs", mode="after")
    @classmethod
    def _numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        # YAML reads 1e-7 as text.
        return {key: _number(item) if isinstance(item, str) else item for key, item in value.items()}

    @model_validator(mode="after")
    def _one_warmup(self) -> "OptimConfig":
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio set the same warm-up: remove one of them")
        return self


class EarlyStoppingConfig(Section):
    """Rules that end a stage before its last step; `early_stopping/reason` in metrics.jsonl is the reason."""

    metric: str = "reward"
    """Metric to which `target`, `patience` and `load_best_model_at_end` apply: any number in metrics.jsonl
    except times."""
    greater_is_better: bool = True
    """Whether a greater value of the metric is better."""
    target: float | None = None
    """End the stage when the metric reaches this value; null sets no target."""
    patience: int | None = Field(default=None, ge=1)
    """End the stage when the metric has not improved for this many values; null disables this rule."""
    max_tokens: int | None = Field(default=None, ge=1)
    """End the stage after training on this many completion tokens; null sets no limit."""
    max_rollouts: int | None = Field(default=None, ge=1)
    """End the stage after sampling this many rollouts, replaced ones included (rollout.max_resample_times);
    null sets no limit."""


class Config(Section):
    """The configuration of a run."""

    method: Literal[
        "sft", "a-sft", "grpo", "a-grpo", "chord-mu", "chord-phi", "uniapl", "gad", "opd", "dpo"
    ] = "uniapl"
    """Training method; it sets some values of `objective` and provides defaults for others."""
    output_dir: PathText = "runs/uniapl"
    """Directory of the run."""
    overwrite: bool = False
    """Replace a run that already exists in output_dir."""
    resume: PathText = "never"
    """Checkpoint to resume from; a path, auto for the newest complete one, or never."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random draw."""
    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps; with stages, the default of each stage."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the prompts (over the demonstrations if the method samples no rollouts) in place of
    max_steps; with stages, the default of each stage. null uses max_steps."""
    save_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep, in addition to the best one (load_best_model_at_end)."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between lines on the console; the files contain every step."""
    log_completions_steps: int = Field(default=20, ge=0)
    """Steps between printing two sampled completions next to their demonstration; 0 prints none."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Trackers that receive the metrics in addition to metrics.jsonl."""
    run_name: str | None = None
    """Name of the run in wandb, trackio and mlflow; null uses the last part of output_dir."""
    run_group: str | None = None
    """Group of the run in wandb and trackio, and its tag `group` in mlflow, such as the name of a series of
    seeds; null sets none."""
    log_gradients_steps: int = Field(default=0, ge=0)
    """Steps between measurements of each loss component's own gradient, each of which costs a forward and a
    backward pass per component; 0 never measures."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; evaluation.suites are also evaluated at the end. 0 never evaluates."""
    eval_on_start: bool = False
    """Evaluate before the first step also; the scores are logged as step 0."""
    load_best_model_at_end: bool = False
    """Make the checkpoint with the best early_stopping.metric of the last stage the result, and keep it. An
    eval/ metric that improves saves a checkpoint; other metrics are compared every save_steps."""
    stages: tuple[dict[str, Any], ...] = ()
    """Stages of a pipeline: each has a `method`, and optionally `max_steps` and changes to any section."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    batching: BatchingConfig = BatchingConfig()
    health: HealthConfig = HealthConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def cold_start_steps(self) -> int:
        """Number of steps of the cold start; 0 if they would train on nothing, as with grpo."""
        value = self.batching.cold_start_steps
        if not self.objective.mu_peak and not self.batching.cold_start_prompts_per_step:
            return 0
        return round(value * self.max_steps) if value < 1 else int(value)

    @property
    def first_rollout_step(self) -> int:
        """First step that samples rollouts."""
        return 0 if self.batching.cold_start_prompts_per_step else self.cold_start_steps

    @property
    def discriminator_step(self) -> int:
        """First step in which a discriminator can learn: with rollouts, and with the reference it reads."""
        reference = self.reference_step if self.discriminator.reads_reference else 0
        return max(self.first_rollout_step, reference)

    def is_frozen(self, step: int) -> bool:
        """Whether the discriminator is no longer trained in this step of the stage."""
        limit = self.discriminator.freeze_after_steps
        return limit is not None and step - self.discriminator_step >= limit

    @property
    def cold_start_demonstrations_per_step(self) -> int:
        """Demonstrations of each cold-start step."""
        completions = self.batching.prompts_per_step * self.rollout.num_generations
        return self.batching.cold_start_demonstrations_per_step or completions

    @property
    def reference_step(self) -> int:
        """Step whose policy is the reference."""
        step = self.objective.reference_step
        return self.cold_start_steps if step is None else step

    @property
    def adversary_step(self) -> int:
        """First step in which the adversary may act, after the discriminator's warm-up."""
        return self.discriminator_step + (
            self.discriminator.warmup_steps if self.discriminator.is_trained else 0
        )

    @property
    def learns_from_demonstrations(self) -> bool:
        """Whether any step draws demonstrations."""
        return self.imitates or self.objective.pairs_rejected

    @property
    def imitates(self) -> bool:
        """Whether any step trains on demonstrations with the SFT loss."""
        cold = self.cold_start_steps > 0 and self.objective.mu_peak > 0
        return cold or self.objective.imitates

    @model_validator(mode="after")
    def _resume_keeps_the_run(self) -> "Config":
        if self.overwrite and self.resume != "never":
            raise ValueError("overwrite would delete the run that resume continues: remove one of the two")
        return self

    @field_validator("report_to", mode="before")
    @classmethod
    def _tracker_names(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else value
        return () if names in (("none",), ["none"]) else names  # "none" as in transformers and TRL


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
