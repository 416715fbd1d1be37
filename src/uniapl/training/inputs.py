"""The inputs of a run that are loaded before the model's weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.data.streams import split_streams
from uniapl.data.tokenization import text_length
from uniapl.evaluation import Suite
from uniapl.models.loading import ModelSource, pad_id_of
from uniapl.rewards import Rewarder
from uniapl.tools.environments import Environment
from uniapl.tools.functions import Tool
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
    tools: tuple[Tool, ...] = ()
    """Functions that the policy can call, and the methods of the environment."""
    environment: Environment | None = None
    """The class of which each rollout has its own instance."""
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

    def text_length(self, ids: TokenIds, *, stop_strings: Sequence[str]) -> int:
        """Number of tokens of a completion before what closed it."""
        return text_length(ids, self.stop_ids, stop_strings, self.tokenizer)


def stream_examples(
    config: Config, dataset: Dataset, rewarder: Rewarder
) -> tuple[list[Example], list[Example]]:
    """Return the examples of the prompt stream and of the demonstration stream.

    If the demonstrations serve only as a part of preference pairs, rows without a pair are left out.
    """
    objective = config.objective
    prompts, demonstrations = split_streams(
        dataset,
        can_be_rewarded=rewarder.applies_to,
        compares=objective.lambda_adv > 0 or objective.pairs_rollouts,
        uses_teacher=objective.teacher_kl > 0,
    )
    if objective.pairs_rejected and not config.imitates:
        demonstrations = [example for example in demonstrations if example.is_pair]
    return prompts, demonstrations


def prompts_drawn(config: Config) -> int:
    """Prompts that the steps of a stage draw, without those that replace others."""
    cold, batching = config.cold_start_steps, config.batching
    after = batching.prompts_per_step * (config.max_steps - cold)
    return after + batching.cold_start_prompts_per_step * cold
