"""What the adversary of a run did: in how many steps it acted, and by how much it changed rewards."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from uniapl.report.analysis import number


@dataclass(kw_only=True)
class AdversaryEffect:
    """Counts and sums over the steps of a run in stages with an adversary."""

    steps: int = 0
    """Steps of these stages."""
    rollout_steps: int = 0
    """Those with rollouts."""
    active_steps: int = 0
    """Those in which the adversary acted."""
    changed_steps: int = 0
    """Those in which it multiplied rewards, which the two sums are over."""
    reward_change: float = 0.0
    """Sum of `adversary/reward_change`."""
    advantage_change: float = 0.0
    """Sum of `adversary/advantage_change`."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "AdversaryEffect":
        """The effect over the steps of metrics.jsonl."""
        effect = cls()
        for record in records:
            effect.add(record)
        return effect

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the metrics of a step; a step without an adversary has no `adversary/active`."""
        if "adversary/active" not in record:
            return
        self.steps += 1
        self.rollout_steps += "completions/mean_length" in record
        self.active_steps += record["adversary/active"] == 1
        reward, advantage = (
            number(record.get(f"adversary/{name}_change")) for name in ("reward", "advantage")
        )
        if reward is not None and advantage is not None:
            self.changed_steps += 1
            self.reward_change += reward
            self.advantage_change += advantage

    @property
    def acted(self) -> str | None:
        """In how many of the steps with rollouts it acted; None for a run without an adversary."""
        return f"{self.active_steps:,} of {self.rollout_steps:,}" if self.steps else None

    @property
    def changes(self) -> str | None:
        """The mean changes; None if it multiplied no reward."""
        if not self.changed_steps:
            return None
        reward, advantage = (x / self.changed_steps for x in (self.reward_change, self.advantage_change))
        return f"it changed rewards by {reward:.2f} and advantages by {advantage:.2f} on average"

    @property
    def sentence(self) -> str | None:
        """Both as one sentence without a full stop; None for a run without an adversary."""
        if not self.steps:
            return None
        if not self.rollout_steps:
            return "the adversary did not act, because no step had rollouts"
        acted = f"the adversary acted in {self.acted} steps with rollouts"
        return f"{acted}; {self.changes}" if self.changes else acted
