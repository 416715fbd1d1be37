"""What a program passes to `uniapl.train`: objects in place of files, and functions of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.parsing import NumberedRow
from uniapl.data.reading import number_rows
from uniapl.errors import UsageError
from uniapl.training.evaluation import Evaluate

Rows = Iterable[Mapping[str, Any]]
OnStepEnd = Callable[[Mapping[str, Any]], None]
"""Called with the metrics of a step, as metrics.jsonl has them."""
EVAL = "eval"
"""Name of the suite of an `eval_dataset` without names."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """The arguments of :func:`uniapl.train` except for the configuration."""

    model: PreTrainedModel | None = None
    processing_class: PreTrainedTokenizerBase | None = None
    train_dataset: Rows | None = None
    eval_dataset: Rows | Mapping[str, Rows] | None = None
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = ()
    evaluate: Evaluate | None = None
    on_step_end: OnStepEnd | None = None

    @property
    def functions(self) -> Sequence[Callable[..., Any]]:
        """The reward functions as a sequence."""
        return [self.reward_functions] if callable(self.reward_functions) else self.reward_functions

    def suites(self, config: Config) -> dict[str, list[NumberedRow]]:
        """Name of a suite -> its rows."""
        if self.eval_dataset is None:
            return {}
        named = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {EVAL: self.eval_dataset}
        return {str(name): number_rows(rows, config.data) for name, rows in named.items()}

    def check(self, config: Config) -> None:
        """Check that nothing that is given has no effect.

        Raises:
            UsageError: A model without a tokenizer or the reverse, or rows that are never evaluated.
        """
        if (self.model is None) != (self.processing_class is None):
            missing = "processing_class" if self.processing_class is None else "model"
            raise UsageError(f"model and processing_class belong together: '{missing}' is missing")
        if self.eval_dataset is not None and not config.eval_steps:
            raise UsageError("eval_dataset is never evaluated: set eval_steps")

    def save_model(self, config: Config) -> None:
        """Save the model object where the run loads it from, unless the directory belongs to an older run.

        A run that is resumed starts from the same model again, whatever object is given.
        """
        if self.model is None or self.processing_class is None:
            return
        directory, output = start_directory(config), Path(config.output_dir)
        taken = output.exists() and any(output.iterdir()) and not config.overwrite
        if not (directory.exists() and taken):
            self.model.save_pretrained(directory)
            self.processing_class.save_pretrained(directory)


def start_directory(config: Config) -> Path:
    """Where the start model of a run is saved if it is given as an object: next to the run directory."""
    output = Path(config.output_dir)
    return output.with_name(f"{output.name}-start")
