"""Sample a model on the suites of a comparison, and score its completions and the expert's by likelihood.

The result holds raw values per completion, so that everything derived from them (`measures`) can be computed
again without the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.reading import read_rows
from uniapl.evaluation import Suite, evaluate_suite, load_suites
from uniapl.evaluation.run import SuiteResult
from uniapl.models.loading import ModelSource, load_model_config, load_stop_ids, load_tokenizer, pad_id_of
from uniapl.models.policy import Policy
from uniapl.models.token_states import TokenReader
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.build_sampler import Tooling, with_tools
from uniapl.training.distributed.accelerator import uses_bf16
from uniapl.types import Tokens

VALIDATION = "validation"
"""Suite of the search: training prompts that its cells do not train on."""
HELD_OUT = "held-out demonstrations"
"""Suite of training rows whose demonstrations no cell trains on, if the recipe's suites have no
completions."""
MAX_TOKENS = 8192
"""Tokens per batch of the likelihoods."""

TOOL_USE = ("calls", "failed", "malformed", "unanswered")
"""Counts of a completion's tool calls."""

Sample = dict[str, dict[str, Any]]
"""Suite -> `headline`, `scores` (score -> a sum and a count per prompt), and one value per completion in
`texts`, `tokens`, `truncated` and `base_logprobs` (nats per token); with tools, `tools` has the counts
:data:`TOOL_USE` of each completion. `expert` has the same of the expert's
completions, `logprobs` under the sampled model, and the `index` of the prompt of each. Points of a curve have
no likelihoods."""


@dataclass(frozen=True, kw_only=True)
class Suites:
    """The suites of a cell with what is needed to sample on them."""

    config: Config
    source: ModelSource
    """The model before training."""
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    suites: Sequence[Suite]

    @staticmethod
    def load(config: Config, cut: Mapping[str, Sequence[int]], *, search: bool) -> "Suites":
        """Load the recipe's suites and the rows that are cut from the training data.

        Args:
            cut: Suite -> numbers of the training rows that form it.
            search: Only the validation prompts.
        """
        source = ModelSource.resolve(config.model)
        tokenizer = load_tokenizer(source)
        model_config = load_model_config(source)
        stop_ids = load_stop_ids(source, model_config, tokenizer)
        window = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        limits: dict[str, Any] = {"stop_ids": stop_ids, "context_length": window}
        wanted = [name for name in cut if (name == VALIDATION) == search]
        rows = {name: [row for row in read_rows(config.data) if row[0] in set(cut[name])] for name in wanted}
        suites = () if search else load_suites(config, tokenizer, **limits)
        if rows:
            suites = (*suites, *load_suites(config, tokenizer, rows=rows, **limits))
        return Suites(
            config=config, source=source, tokenizer=tokenizer, stop_ids=frozenset(stop_ids), suites=suites
        )

    def sample(self, model: PreTrainedModel, seed: int) -> tuple[Sample, dict[str, SuiteResult]]:
        """The completions of a model with their scores, and the results of the suites."""
        settings = SamplingSettings.of_evaluation(self.config, self.stop_ids, self.tokenizer)
        sampler = LocalSampler(
            model=model,
            settings=replace(settings, temperature=sampling_temperature(self.config)),
            pad_id=pad_id_of(self.tokenizer),
            max_batch_size=self.config.rollout.max_batch_size,
            decoding=self.config.rollout.decoding,
            # As training samples. Likelihoods, whose small differences count, are computed in fp32.
            autocast=partial(
                torch.autocast, model.device.type, torch.bfloat16, enabled=uses_bf16(self.config)
            ),
        )
        tooling = Tooling.of(self.config, self.tokenizer, self.stop_ids)
        sampler = with_tools(sampler, self.config, tooling, settings.max_completion_length)
        num_samples = self.config.evaluation.num_samples
        found: Sample = {}
        results: dict[str, SuiteResult] = {}
        for suite in self.suites:
            result = evaluate_suite(
                suite, sampler, self.tokenizer, num_samples=num_samples, seed=seed, with_floors=False
            )
            results[suite.name] = result
            found[suite.name] = {
                "headline": suite.headline,
                "scores": result.summary["per_prompt"],
                "texts": [completion["completion"] for completion in result.completions],
                "tokens": [rollout.num_sampled for rollout in result.rollouts],
                "truncated": [rollout.finish_reason == "length" for rollout in result.rollouts],
            }
            uses = [rollout.tool_use for rollout in result.rollouts]
            if tooling.tools:
                found[suite.name]["tools"] = {name: [getattr(use, name) for use in uses] for name in TOOL_USE}
        return found, results

    def add_likelihoods(
        self,
        sample: Sample,
        results: Mapping[str, SuiteResult],
        model: PreTrainedModel,
        base: PreTrainedModel,
    ) -> None:
        """Add the log-probabilities of the expert's completions, and of the sampled ones under the base."""
        for suite in self.suites:
            samples = self.config.evaluation.num_samples
            prompts = [example.prompt_ids for example in suite.examples for _ in range(samples)]
            rollouts = results[suite.name].rollouts
            sampled = [
                Tokens(prompt, rollout.completion_ids, rollout.given)
                for prompt, rollout in zip(prompts, rollouts, strict=True)
            ]
            experts = [
                (index, tokens)
                for index, example in enumerate(suite.examples)
                if (tokens := example.demonstration_tokens) is not None
            ]
            pairs = [tokens for _, tokens in experts]
            entry = sample[suite.name]
            entry["base_logprobs"] = mean_logprobs(base, sampled, pad_id_of(self.tokenizer))
            entry["expert"] = {
                "index": [index for index, _ in experts],
                "texts": [suite.examples[index].demonstration for index, _ in experts],
                "tokens": [tokens.num_written for _, tokens in experts],
                "logprobs": mean_logprobs(model, pairs, pad_id_of(self.tokenizer)),
                "base_logprobs": mean_logprobs(base, pairs, pad_id_of(self.tokenizer)),
            }


def sampling_temperature(config: Config) -> float:
    """`evaluation.temperature`; if it is null that of the rollouts, because distributions are compared."""
    given = config.evaluation.temperature
    return config.rollout.temperature if given is None else given


def mean_logprobs(model: PreTrainedModel, sequences: Sequence[Tokens], pad_id: int) -> list[float]:
    """The mean log-probability of each completion's tokens at temperature 1, in nats."""
    policy = Policy(model)
    reader = TokenReader(
        model=policy,
        layers=(),
        temperature=1.0,
        pad_id=pad_id,
        max_tokens=MAX_TOKENS,
        packed=policy.packs,
        device=model.device,
    )
    return [float(tokens.logprobs.mean()) for tokens in reader.read(sequences)]
