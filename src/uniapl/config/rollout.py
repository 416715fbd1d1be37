"""Sampling of completions for training."""

from typing import Literal

from pydantic import Field, model_validator

from uniapl.config.section import Section, Texts


class RolloutConfig(Section):
    """Sampling of completions."""

    num_generations: int = Field(default=8, ge=2)
    """Rollouts per prompt (TRL's default)."""
    max_completion_length: int = Field(default=256, ge=1)
    """Maximum number of new tokens per rollout."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of sampling and of the log-probabilities in the loss on rollouts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; the log-probabilities remain those of the full distribution. 1 disables it."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k most likely tokens, with log-probabilities as for top_p; 0 disables it."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Least probability relative to the most likely token's; less likely tokens are not sampled, with
    log-probabilities as for top_p. 0 disables it."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Penalty on earlier tokens, also the prompt's; it divides their logits that are positive and multiplies
    the others, with log-probabilities as for top_p. 1 disables it."""
    stop_strings: Texts = ()
    """Texts that end a completion. They belong to it, with all of the token that completes them."""
    tools: Texts = ()
    """Functions that the policy can call in a rollout: `module:function` or `path.py:function`, with type
    hints and a docstring that describes their arguments (TRL's tools)."""
    environment: str | None = None
    """Class of which each rollout has its own instance: `module:Class` or `path.py:Class`. The policy can
    call its public methods, and reward functions get the instances (TRL's environment_factory); null has
    none."""
    max_tool_calling_iterations: int | None = Field(default=None, ge=1)
    """Turns of a rollout after which tools are called; null has no limit but max_completion_length, which
    counts the results too."""
    tool_timeout: float = Field(default=10.0, gt=0)
    """Time limit of a call in seconds; afterwards its result is an error that the policy reads. Making an
    environment and its `reset` have the same limit."""
    max_tool_result_length: int = Field(default=4000, ge=1)
    """Maximum number of characters of a result; longer ones are cut."""
    max_batch_size: int = Field(default=256, ge=1)
    """Maximum number of rollouts that are decoded at the same time."""
    max_resample_times: int = Field(default=0, ge=0)
    """Times that a step samples new prompts in place of those whose rollouts all have the same reward
    (dynamic sampling, DAPO). Replaced rollouts are counted and not trained on; 0 replaces none."""
    decoding: Literal["fused", "plain"] = "fused"
    """fused runs fewer operations per token for models like Llama, Mistral, Qwen2 and Qwen3; plain runs the
    model's own forward pass, which is the reference and is used for all other models."""
    sampler: Literal["local", "vllm"] = "local"
    """Sampler of the rollouts; local uses transformers in the training process, vllm uses vLLM."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """Run vLLM on the trainer's GPU (colocate), or use a running `vllm serve` (server)."""
    vllm_server_base_url: str = "http://localhost:8000"
    """URL of the vLLM server (vllm_mode: server)."""
    vllm_timeout: float = Field(default=600.0, gt=0)
    """Timeout of one call to vLLM, and of waiting for a server to start or restart, in seconds."""
    vllm_gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Fraction of the GPU's memory that a colocated vLLM uses (TRL's default)."""
    vllm_importance_sampling_clip_max: float = Field(default=2.0, ge=1)
    """Upper bound of the importance weights, which correct for the difference between vLLM and trainer."""
    vllm_max_logp_difference: float = Field(default=0.05, gt=0)
    """Stop the run when, with the same weights, the log-probabilities of vLLM and the trainer differ by more
    than this over a completion, in nats per token on average."""
    max_off_policy_steps: int = Field(default=0, ge=0, le=1)
    """Policy updates between sampling a rollout and training on it. With 1, a vLLM server samples the next
    step's rollouts while this step trains, and importance weights correct for the difference. With 0, every
    step samples before it trains."""

    @model_validator(mode="after")
    def _off_policy_needs_a_server(self) -> "RolloutConfig":
        if self.max_off_policy_steps and not self.behind_server:
            raise ValueError(
                "max_off_policy_steps 1 needs sampler vllm and vllm_mode server: the trainer's own device is "
                "busy while it trains"
            )
        return self

    @model_validator(mode="after")
    def _environments_live_in_a_step(self) -> "RolloutConfig":
        if self.environment is not None and self.max_off_policy_steps:
            raise ValueError(
                "environment needs max_off_policy_steps 0: rollouts that wait for the next step are saved in "
                "checkpoints, and instances of environments cannot be"
            )
        return self

    @property
    def behind_server(self) -> bool:
        """Whether a vLLM server samples, on its own device."""
        return self.sampler == "vllm" and self.vllm_mode == "server"

    @property
    def importance_cap(self) -> float | None:
        """Upper bound of the importance weights; None if the trainer itself samples."""
        return self.vllm_importance_sampling_clip_max if self.sampler == "vllm" else None
