"""How often the rollouts of each prompt pass, and how often the prompt is drawn because of it."""

import statistics
from collections.abc import Mapping, Sequence

from uniapl.types import Example, derive_seed

DECAY = 0.5
"""Weight of a prompt's earlier rollouts each time that it is sampled again, because the policy has changed.
Prompts whose rollouts always pass are then drawn at 31 to 39 % of their turns. Our choice."""


class PassRates:
    """Numbers of passed and of failed rollouts of each prompt; earlier ones lose weight at every visit.

    Prompts are identified by their token ids, so that rows may be added or reordered.

    Example (8 rollouts per visit, of which 2 pass, then all):
        counts [2, 6], then [0.5 * 2 + 8, 0.5 * 6 + 0] = [9, 3]: the pass rate is 0.75
    """

    def __init__(self, counts: Mapping[str, Sequence[float]] | None = None) -> None:
        self.counts: dict[str, tuple[float, float]] = {
            key: (passed, failed) for key, (passed, failed) in (counts or {}).items()
        }
        """Key of a prompt -> weighted numbers of passed and failed rollouts, as in state.json."""

    def update(self, example: Example, passed: Sequence[bool]) -> None:
        """Count a visit.

        Args:
            passed: One entry per rollout with a known reward; without any, nothing changes.
        """
        if passed:
            passes, failures = self.counts.get(_key(example), (0.0, 0.0))
            new = sum(passed)
            self.counts[_key(example)] = (DECAY * passes + new, DECAY * failures + len(passed) - new)

    def never_passed(self, example: Example) -> bool:
        """Whether the prompt was sampled, and none of its rollouts passed."""
        passes, failures = self.counts.get(_key(example), (0.0, 0.0))
        return failures > 0 and passes == 0

    def probability(self, example: Example, num_generations: int) -> float:
        """The probability that not all of the prompt's next rollouts pass, with which it is drawn.

        `1 - ((passes + 1) / (passes + failures + 2)) ** num_generations`, by Laplace's rule of succession; 1
        for a prompt that was not sampled. It is never 0.
        """
        if _key(example) not in self.counts:
            return 1.0
        passes, failures = self.counts[_key(example)]
        return 1 - ((passes + 1) / (passes + failures + 2)) ** num_generations

    def metrics(self) -> dict[str, float]:
        """The mean pass rate of the sampled prompts, and the fraction of them that never passed."""
        if not self.counts:
            return {}
        rates = [passes / (passes + failures) for passes, failures in self.counts.values()]
        return {
            "prompts/pass_rate": statistics.fmean(rates),
            "prompts/never_passed": statistics.fmean(rate == 0 for rate in rates),
        }


def _key(example: Example) -> str:
    return f"{derive_seed(0, 'prompt', *example.prompt_ids):016x}"
