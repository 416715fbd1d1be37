"""Evaluation during training: the configured suites and the user's own function."""

from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.evaluation import evaluate_suite
from uniapl.rollout.local import LocalSampler
from uniapl.training.inputs import RunInputs
from uniapl.training.run import Evaluate


def make_evaluate(
    config: Config, inputs: RunInputs, accelerator: Accelerator, *, last_step: int, custom: Evaluate | None
) -> Evaluate | None:
    """The function that a run calls after each step; None if there is nothing to evaluate."""
    if not config.eval_steps or not inputs.suites:
        return custom

    def evaluate(step: int, model: PreTrainedModel) -> dict[str, Any]:
        found: dict[str, Any] = dict(custom(step, model)) if custom is not None else {}
        if step % config.eval_steps and step != last_step:
            return found
        sampler = LocalSampler(
            model=model,
            stop_ids=inputs.stop_ids,
            pad_id=inputs.pad_id,
            max_completion_length=config.evaluation.max_completion_length,
            temperature=config.evaluation.sampling_temperature,
            max_batch_size=config.rollout.max_batch_size,
            decoding=config.rollout.decoding,
            autocast=accelerator.autocast,
        )
        for suite in inputs.suites:
            result = evaluate_suite(
                suite,
                sampler,
                inputs.tokenizer,
                num_samples=config.evaluation.num_samples,
                seed=config.seed,
                with_floors=False,
            )
            found |= {f"{suite.name}/{name}": value for name, value in result.metrics.items()}
        return found

    return evaluate
