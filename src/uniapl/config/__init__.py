"""The whole configuration: strict, frozen, the same keys in YAML, on the command line and from Python.

Keys are TRL's wherever TRL has one. A method is a setting of numbers, never a branch: `uniapl.config.methods`
lists the values that a method fixes and those that it only proposes.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from uniapl.config.objective import DiscriminatorConfig, ObjectiveConfig
from uniapl.config.section import Section


class ModelConfig(Section):
    """The policy's start."""

    model_name_or_path: str | None = Field(
        default=None, description="Directory or Hub id of a causal language model."
    )
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub model.")
    attn_implementation: str | None = Field(default=None, description="As in transformers: sdpa, eager, ...")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    lora_r: int | None = Field(
        default=None,
        ge=1,
        description="Train an adapter of this rank (LoRA) and leave the model's weights as they are; None: "
        "train all weights.",
    )
    lora_alpha: int | None = Field(
        default=None, ge=1, description="The adapter's change is scaled by lora_alpha / lora_r; None: by 2."
    )
    lora_target_modules: tuple[str, ...] = Field(
        default=("all-linear",),
        min_length=1,
        description="Layers that get an adapter, by the ends of their names; all-linear: all but the head.",
    )

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _one_module_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _an_adapter_has_a_rank(self) -> "ModelConfig":
        if self.lora_r is None and (self.lora_alpha or self.lora_target_modules != ("all-linear",)):
            raise ValueError("lora_alpha and lora_target_modules are an adapter's: give lora_r, its rank")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise ValueError("lora_target_modules: all-linear stands alone: leave it out, or the others")
        return self


class DataConfig(Section):
    """Rows with `prompt` and optionally `completion`, or with `messages`; other columns go to the rewards."""

    path: str | None = Field(
        default=None, description="A .jsonl, .json, .csv or .parquet file, or a Hub data set id."
    )
    split: str = Field(default="train", description="Split of a Hub data set.")
    columns: dict[str, str] = Field(
        default={}, description="Renames columns: {theirs: ours}, e.g. {problem: prompt}."
    )
    prompt_format: Literal["text", "chat"] = Field(
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
        description="Longer demonstrations are left out; a truncated one would teach the policy not to stop.",
    )


class RolloutConfig(Section):
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
    max_batch_size: int = Field(
        default=256, ge=1, description="Maximum number of rows decoded at the same time."
    )
    decoding: Literal["fused", "plain"] = Field(
        default="fused",
        description="fused: few operations per token, for models like Llama, Mistral, Qwen2, Qwen3; plain: "
        "the model's own forward, which is the reference, and what other models get anyway.",
    )
    sampler: Literal["local", "vllm"] = Field(
        default="local", description="transformers in the training process, or vLLM (docs/gpus.md)."
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        default="colocate",
        description="vLLM on the trainer's own GPU, or behind `vllm serve`.",
    )
    vllm_server_base_url: str = Field(default="http://localhost:8000", description="Of the server.")
    vllm_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds for one call of vLLM, and for a server to come (back) up.",
    )
    vllm_gpu_memory_utilization: float = Field(
        default=0.3, gt=0, le=1, description="Share of the GPU that a colocated vLLM takes (TRL's default)."
    )
    vllm_importance_sampling_clip_max: float = Field(
        default=2.0,
        ge=1,
        description="Cap of the importance weights, which correct for vLLM being another program.",
    )
    vllm_max_logp_difference: float = Field(
        default=0.05,
        gt=0,
        description="The run ends when vLLM, sent new weights, differs from the trainer by more nats per "
        "token in the mean of an answer.",
    )
    max_off_policy_steps: int = Field(
        default=0,
        ge=0,
        le=1,
        description="Policy updates between sampling a rollout and training on it. With 1, a vLLM server "
        "samples the next step's rollouts while this step trains; importance weights correct for it.",
    )

    @model_validator(mode="after")
    def _off_policy_needs_a_server(self) -> "RolloutConfig":
        if self.max_off_policy_steps and not self.behind_server:
            raise ValueError(
                "max_off_policy_steps 1 needs sampler vllm and vllm_mode server: the trainer's own device is "
                "busy while it trains"
            )
        return self

    @property
    def behind_server(self) -> bool:
        """Another program samples, on a device of its own."""
        return self.sampler == "vllm" and self.vllm_mode == "server"

    @property
    def importance_cap(self) -> float | None:
        """Of the importance weights; None where sampler and trainer are the same program."""
        return self.vllm_importance_sampling_clip_max if self.sampler == "vllm" else None


class RewardFunctionConfig(Section):
    """One reward function."""

    name: str = Field(description="Registry name, `module:function` or `path.py:function`.")
    weight: float = Field(default=1.0, description="Factor in the sum over functions.")
    args: dict[str, bool | int | float | str] = Field(
        default={}, description="Keyword arguments bound to it."
    )


class RewardsConfig(Section):
    """How answers are scored."""

    functions: tuple[RewardFunctionConfig, ...] = Field(
        default=(), description="Names, or {name, weight, args}."
    )
    timeout: float | None = Field(
        default=60.0,
        gt=0,
        description="Seconds for one call of one function; None calls it in the main thread.",
    )

    allow_code_verifiers: bool = Field(
        default=False,
        description="Run verifier functions that the data holds as Python source, in a sandbox (Linux).",
    )

    @field_validator("functions", mode="before")
    @classmethod
    def _names_are_enough(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"name": item} if isinstance(item, str) else item for item in value)
        return value


class OptimConfig(Section):
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
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the update's backward pass instead of keeping them: less "
        "memory, a third more work there; sampling keeps its cache.",
    )
    bf16: bool | None = Field(default=None, description="bf16 autocast; by default on GPUs, not on CPUs.")


class BatchingConfig(Section):
    """What one step holds and how it is cut; the loss does not depend on the cut."""

    prompts_per_step: int = Field(default=8, ge=1, description="Prompts that are sampled in each step.")
    demonstrations_per_step: int = Field(default=8, ge=1, description="Demonstrations in each step.")
    per_device_train_batch_size: int | None = Field(
        default=None, ge=1, description="Rows of a micro-batch at most; by default only the tokens count."
    )
    max_tokens_per_micro_batch: int = Field(
        default=16384,
        ge=1,
        description="Tokens of a micro-batch at most, one row at least: a shared prompt counts once, "
        "padding where rows are not packed.",
    )
    packing: bool = Field(
        default=True,
        description="No padding, each prompt once, and no rows that teach nothing, where the model's "
        "attention allows it; false: padded rows, the reference.",
    )


class HealthConfig(Section):
    """When a run warns, and when it stops by itself (exit code 3)."""

    max_skipped_steps: int = Field(
        default=5,
        ge=1,
        description="Steps in a row with a non-finite gradient, or with a reward that failed every call.",
    )
    window: int = Field(
        default=10, ge=2, description="Steps that the warnings look at, and compare with as many before."
    )
    max_frac_reward_zero_std: float = Field(
        default=0.9, ge=0, le=1, description="Warn from this share of groups whose rewards are all equal."
    )
    max_clipped_ratio: float = Field(
        default=0.5, ge=0, le=1, description="Warn above this share of answers that were cut off."
    )
    min_entropy: float = Field(default=0.02, ge=0, description="Warn below so many nats per token.")
    max_kl_growth: float = Field(
        default=10.0, gt=1, description="Warn when a step's KL is so many times the usual one."
    )
    max_length_growth: float = Field(
        default=2.0,
        gt=1,
        description="Warn when answers get so many times as long within a window, or as the expert's.",
    )
    max_length_advantage: float = Field(
        default=0.1,
        ge=0,
        description="Warn when length alone tells policy from expert by so much better than it.",
    )
    max_discriminator_accuracy: float = Field(
        default=0.99, ge=0, le=1, description="Warn from this accuracy of the discriminator on fresh pairs."
    )
    max_sampling_difference: float = Field(
        default=0.05,
        ge=0,
        description="Warn when sampler and trainer differ by more nats per token, in the mean of a step.",
    )


class EarlyStoppingConfig(Section):
    """When a stage ends before its last step; the reason stands in the metrics as `early_stopping/reason`."""

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


class EvaluationConfig(Section):
    """What is measured on other prompts, every `eval_steps` and by `uniapl evaluate`."""

    suites: tuple[str, ...] = Field(
        default=(),
        description="ifeval, ifbench (from the Hub), NAME=PATH, or a file of rows, which the run's rewards "
        "score.",
    )
    max_completion_length: int = Field(default=1280, ge=1, description="New tokens per answer (lm-eval's).")
    num_samples: int = Field(default=1, ge=1, description="Answers per prompt, k of pass@k.")
    temperature: float | None = Field(
        default=None,
        ge=0,
        description="Of sampling; 0 takes the likeliest token. By default 0, and 1 with several samples.",
    )
    limit: int | None = Field(default=None, ge=1, description="The first so many prompts of each suite.")
    answer_after: str | None = Field(
        default=None, description="Benchmarks judge what stands behind this mark, e.g. </think>."
    )

    @property
    def sampling_temperature(self) -> float:
        """The temperature, with its default."""
        return self.temperature if self.temperature is not None else float(self.num_samples > 1)

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationConfig":
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples {self.num_samples} at temperature 0 would be equal answers")
        return self

    @field_validator("suites", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


Method = Literal["sft", "a-sft", "grpo", "a-grpo", "chord-mu", "chord-phi", "uniapl", "gad"]


class Config(Section):
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
    log_completions_steps: int = Field(
        default=20,
        ge=0,
        description="Steps between two sampled answers on the console, beside the expert's; 0: never.",
    )
    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = Field(
        default=(), description="Trackers that get the metrics too; metrics.jsonl is always written."
    )
    log_gradients_steps: int = Field(
        default=0,
        ge=0,
        description="Steps between measurements of each force's own gradient, which cost a forward and a "
        "backward pass per force; 0: never.",
    )
    eval_steps: int = Field(
        default=0,
        ge=0,
        description="Steps between looks at evaluation.suites, and at the last planned one; 0: never.",
    )
    stages: tuple[dict[str, Any], ...] = Field(
        default=(), description="A pipeline: each with its `method`, `max_steps` and changes to any section."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_is_enough(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = (value,)
        # As in transformers and TRL.
        return () if value in (("none",), ["none"]) else value

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optim: OptimConfig = OptimConfig()
    batching: BatchingConfig = BatchingConfig()
    health: HealthConfig = HealthConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
