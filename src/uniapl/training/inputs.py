"""The inputs of a run that are loaded before the model's weights."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.data.streams import split_streams
from uniapl.evaluation import Suite
from uniapl.rewards import Rewarder
from uniapl.types import Example


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run is made of, the model's weights aside: loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    rewarder: Rewarder
    stop_ids: frozenset[int]
    """Every token that ends an answer: the sampler stops at them, demonstrations are cut behind them."""
    data_sha256: str
    notes: tuple[str, ...] = ()
    """What the user should hear of the data."""
    suites: tuple[Suite, ...] = ()
    """What is evaluated."""

    @property
    def pad_id(self) -> int:
        """What fills the rows of a batch; masks never look at it."""
        assert isinstance(self.tokenizer.pad_token_id, int)
        return self.tokenizer.pad_token_id


def streams(config: Config, dataset: Dataset, rewarder: Rewarder) -> tuple[list[Example], list[Example]]:
    """(prompts to sample for, demonstrations to learn from)."""
    return split_streams(
        dataset, can_be_rewarded=rewarder.applies_to, uses_adversary=config.objective.lambda_adv > 0
    )
