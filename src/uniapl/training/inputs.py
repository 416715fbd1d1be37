"""The inputs of a run that are loaded before the model's weights."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.data.streams import split_streams
from uniapl.evaluation import Suite
from uniapl.models.loading import ModelSource, pad_id_of
from uniapl.rewards import Rewarder
from uniapl.types import Example, TokenIds


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Loaded and checked inputs of a run."""

    source: ModelSource
    """The model from which the run starts."""
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    rewarder: Rewarder
    stop_ids: frozenset[int]
    """Every token that ends a completion: sampling stops there, and demonstrations are cut after them."""
    data_sha256: str
    notes: tuple[str, ...] = ()
    """Notes about the data for the user."""
    suites: tuple[Suite, ...] = ()
    """Evaluation suites."""

    @property
    def pad_id(self) -> int:
        """Token id that pads the rows of a batch; no mask depends on it."""
        return pad_id_of(self.tokenizer)

    def decode(self, ids: TokenIds) -> str:
        """Text of a completion, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def stream_examples(
    config: Config, dataset: Dataset, rewarder: Rewarder
) -> tuple[list[Example], list[Example]]:
    """Return the examples of the prompt stream and of the demonstration stream."""
    return split_streams(
        dataset,
        can_be_rewarded=rewarder.applies_to,
        uses_adversary=config.objective.lambda_adv > 0,
        uses_teacher=config.objective.teacher_kl > 0,
    )
