"""The section `health`: thresholds of the health rules."""

from pydantic import Field

from uniapl.config.section import Section


class HealthConfig(Section):
    """Thresholds at which a run prints a warning or stops (exit code 3)."""

    max_skipped_steps: int = Field(default=5, ge=1)
    """Stop after this many consecutive steps with a non-finite gradient or only failed reward calls."""
    window: int = Field(default=10, ge=2)
    """Steps over which each warning is evaluated; some warnings compare them with as many earlier steps."""
    max_frac_reward_zero_std: float = Field(default=0.9, ge=0, le=1)
    """Warn when all rewards are equal in at least this fraction of the groups."""
    max_clipped_ratio: float = Field(default=0.5, ge=0, le=1)
    """Warn when more than this fraction of the completions is truncated at the length limit."""
    min_entropy: float = Field(default=0.02, ge=0)
    """Warn when the policy's entropy, as estimated by `rollout/entropy_estimate`, is below this, in nats per
    token."""
    max_kl_growth: float = Field(default=10.0, gt=1)
    """Warn when the KL of a step is more than this many times the median of the steps before."""
    max_length_growth: float = Field(default=2.0, gt=1)
    """Warn when the mean length exceeds this many times the previous window's or the demonstrations', or when
    the demonstrations' length exceeds this many times the mean length."""
    max_length_advantage: float = Field(default=0.1, ge=0)
    """Warn when a classifier that uses only the length is more accurate than the discriminator by more than
    this."""
    max_discriminator_accuracy: float = Field(default=0.99, ge=0, le=1)
    """Warn when the discriminator's accuracy on new pairs is at least this."""
    max_sampling_difference: float = Field(default=0.05, ge=0)
    """Warn when log-probabilities of sampler and trainer differ by more than this, in nats per token averaged
    over a step."""
    min_tool_calls: float = Field(default=0.01, ge=0)
    """Warn when a run has tools and the mean number of calls per completion is below this."""
    max_tool_failures: float = Field(default=0.5, ge=0, le=1)
    """Warn when more than this fraction of the tool calls fails."""
