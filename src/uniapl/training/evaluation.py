"""Evaluation during training: the configured suites, divided between ranks, and the user's own function."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.evaluation import Part, evaluate_suite
from uniapl.rollout import Sampler, SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.build_sampler import with_tools
from uniapl.training.distributed.rank_zero_sampler import Groups, RankZeroSampler
from uniapl.training.distributed.ranks import on_rank_zero
from uniapl.training.inputs import RunInputs
from uniapl.training.stage import Stage

Evaluate = Callable[[int, PreTrainedModel], Mapping[str, Any]]
"""(step, model) -> metrics to log."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluates the policy after the steps in which that is due."""

    config: Config
    inputs: RunInputs
    accelerator: Accelerator
    last_step: int
    """The last step of the run, in which the suites are always evaluated."""
    custom: Evaluate | None
    """The user's function, which rank 0 calls after each step."""
    on_step_end: Callable[[Mapping[str, Any]], None] | None = None
    """The user's function that rank 0 calls with the metrics of each step."""

    def metrics(self, step: int, stage: Stage) -> dict[str, Any]:
        """The metrics of the policy after a step, the same on every rank; all ranks call it together.

        With FSDP2 the weights are gathered only if there is something to evaluate.
        """
        every = self.config.eval_steps
        due = bool(every and self.inputs.suites) and (step % every == 0 or step == self.last_step)
        if self.custom is None and not due:
            return {}
        with stage.gathered_policy():
            found = on_rank_zero(self.accelerator, functools.partial(self._by_user, step, stage.model))
            return found | self._by_suites(step, stage) if due else found

    def report(self, record: Mapping[str, Any]) -> None:
        """Pass a step's metrics to the user; all ranks call it together."""
        report = self.on_step_end
        if report is not None:
            on_rank_zero(self.accelerator, lambda: report(dict(record)))

    def _by_user(self, step: int, model: PreTrainedModel) -> dict[str, Any]:
        found = self.custom(step, model) if self.custom is not None else {}
        # Health rules and JSON require Python numbers, not NumPy or torch scalars.
        return {name: value.item() if hasattr(value, "item") else value for name, value in found.items()}

    def _by_suites(self, step: int, stage: Stage) -> dict[str, Any]:
        found: dict[str, Any] = {}
        sampler = self._sampler(step, stage)
        for suite in self.inputs.suites:
            result = evaluate_suite(
                suite,
                sampler,
                self.inputs.tokenizer,
                num_samples=self.config.evaluation.num_samples,
                seed=self.config.seed,
                with_floors=False,
                part=Part(
                    rank=self.accelerator.process_index,
                    world_size=self.accelerator.num_processes,
                    gather=gather_object,
                ),
            )
            found |= {f"{suite.name}/{name}": value for name, value in result.metrics.items()}
        return found

    def _sampler(self, step: int, stage: Stage) -> Sampler:
        """vLLM if the stage samples with it, else the local sampler, with the settings of evaluation."""
        inputs = self.inputs
        # The stage's rollouts may end at other texts than those of the run.
        config = self.config.model_copy(update={"rollout": stage.config.rollout})
        settings = SamplingSettings.of_evaluation(config, inputs.stop_ids, inputs.tokenizer)
        if isinstance(stage.sampler, RankZeroSampler) and stage.config.objective.uses_rollouts:
            return _VLLM(sampler=stage.sampler, policy_version=step, settings=settings)
        sampler = LocalSampler(
            model=stage.model,
            settings=settings,
            pad_id=inputs.pad_id,
            max_batch_size=self.config.rollout.max_batch_size,
            decoding=self.config.rollout.decoding,
            autocast=self.accelerator.autocast,
        )
        return with_tools(sampler, config, inputs, settings.max_completion_length)


@dataclass(frozen=True, kw_only=True)
class _VLLM:
    """The run's vLLM sampler with the settings of evaluation."""

    sampler: RankZeroSampler
    policy_version: int
    settings: SamplingSettings

    def sample(self, request: SampleRequest) -> Groups:
        return self.sampler.evaluate(replace(request, policy_version=self.policy_version), self.settings)

    def check(self) -> None:
        self.sampler.check()
