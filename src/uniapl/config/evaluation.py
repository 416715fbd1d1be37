"""Evaluation of a model on held-out prompts."""

from pydantic import Field, model_validator

from uniapl.config.section import Paths, Section, Texts


class EvaluationConfig(Section):
    """Evaluation on held-out prompts, every `eval_steps` steps and by `uniapl evaluate`."""

    suites: Paths = ()
    """ifeval, ifbench, or files of rows (PATH or NAME=PATH); the run's rewards score the rows of files."""
    metrics: Paths = ()
    """Functions with the signature of a reward function that measure completions without being trained on,
    named as in rewards.functions; the first one is the main score of the suites that it applies to."""
    max_completion_length: int = Field(default=1280, ge=1)
    """Maximum number of new tokens per completion (lm-eval's limit)."""
    num_samples: int = Field(default=1, ge=1)
    """Completions per prompt: the k of pass@k."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; 0 takes the most likely token, null uses 0 for one sample and 1 for several."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 disables it."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k most likely tokens; 0 disables it."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Least probability relative to the most likely token's; less likely tokens are not sampled. 0 disables
    it."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Penalty on earlier tokens, also the prompt's; it divides their logits that are positive and multiplies
    the others. 1 disables it."""
    stop_strings: Texts | None = None
    """Texts that end a completion and belong to it; null uses those of rollout."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate only this many prompts from the start of each suite; null evaluates all."""
    answer_after: str | None = None
    """In benchmarks, score only the text after this marker, such as </think>; null scores all text."""

    @property
    def sampling_temperature(self) -> float:
        """The temperature, with its default filled in."""
        return self.temperature if self.temperature is not None else float(self.num_samples > 1)

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationConfig":
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples {self.num_samples} at temperature 0 would give identical completions"
            )
        return self
