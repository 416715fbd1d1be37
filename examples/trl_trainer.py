"""UniAPL's parts inside TRL's GRPOTrainer: sampler, discriminator, demonstrations.

    python examples/trl_trainer.py MODEL ROWS.jsonl

Three methods of TRL's trainer are extended, each with functions of UniAPL that need no configuration:

* `sample` samples with `LocalSampler`, as the trainer's `rollout_func`.
* `_calculate_rewards` multiplies each reward by the probability u that the completion is the expert's. The
  discriminator is the likelihood under TRL's reference model, so that `beta` must not be 0.
* `_compute_loss` adds the loss of demonstrations, with weight mu.

ROWS.jsonl has the columns `prompt` and `demonstration`, and those of your reward function. Datasets, logging,
checkpoints and vLLM remain TRL's. `uniapl train` does the same in one step with exact normalization over
micro-batches and processes, a cold start, exact resume and a report.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from datasets import load_dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from uniapl.data.batching import Row, collate
from uniapl.functional import multiplied_rewards, sft_loss, win_probability
from uniapl.models.policy import Policy
from uniapl.models.token_states import TokenReader
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.types import Tokens, derive_seed


class MixedTrainer(GRPOTrainer):
    """GRPO on rewards that a likelihood discriminator multiplies, mixed with SFT on demonstrations."""

    def __init__(
        self, *args: Any, mu: float = 0.1, exponent: float = 1.0, likelihood_scale: float = 4.0, **kwargs: Any
    ) -> None:
        """Take TRL's arguments, and the demonstrations' weight, the exponent c of u and the logit per nat."""
        super().__init__(*args, rollout_func=sample, **kwargs)
        self.mu, self.exponent, self.likelihood_scale = mu, exponent, likelihood_scale
        self.demonstrations = [self.row(example) for example in self.train_dataset]
        assert self.ref_model is not None, "set beta: the discriminator reads TRL's reference model"
        self.reference = Policy(self.ref_model)

    def row(self, example: Mapping[str, Any], completion_ids: Sequence[int] | None = None) -> Row:
        """The prompt with its demonstration, closed by the end token, or with another completion."""
        tokenizer: Any = self.processing_class
        if completion_ids is None:
            text_ids = tokenizer(example["demonstration"], add_special_tokens=False)["input_ids"]
            completion_ids = [*text_ids, tokenizer.eos_token_id]
        return Row(
            prompt_ids=tuple(tokenizer(example["prompt"])["input_ids"]),
            completion_ids=tuple(completion_ids),
            components=frozenset({"sft"}),
        )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        # Of all processes; with one reward function per row, [N, 1].
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        logits = self._logits([self.row(x, ids) for x, ids in zip(inputs, completion_ids_list, strict=True)])
        expert = self._logits([self.row(x) for x in inputs])
        u = gather(win_probability(logits.unsqueeze(-1), expert))
        self._log_metric("u", float(u.mean()))
        return multiplied_rewards(rewards, u, rewards >= 1.0, exponent=self.exponent)

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """The discriminator's logits: the mean log-probability per token, without a final end token."""
        end: Any = self.processing_class
        reader = TokenReader(
            model=self.reference,
            layers=(),
            temperature=self.temperature,
            pad_id=self.processing_class.pad_token_id,
            max_tokens=8192,
            packed=False,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )
        means: list[Tensor] = []
        for row, found in zip(
            rows, reader.read([Tokens(r.prompt_ids, r.completion_ids) for r in rows]), strict=True
        ):
            kept = found.logprobs[: -1 if row.completion_ids[-1] == end.eos_token_id else None]
            # An empty completion is never the expert's.
            means.append(kept.mean() if len(kept) else kept.new_tensor(-1e4))
        return self.likelihood_scale * torch.stack(means)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        size, process = len(inputs["completion_ids"]), self.accelerator.process_index
        start = (self._step * self.accelerator.num_processes + process) * size
        rows = [self.demonstrations[i % len(self.demonstrations)] for i in range(start, start + size)]
        batch = collate(rows, pad_id=self.processing_class.pad_token_id, device=self.accelerator.device)
        # The wrapped model takes part in DDP's exchange; its logits are those of the demonstrations.
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch.input_ids[:, 1:, None])
        logprobs = torch.nn.functional.pad(logprobs.squeeze(-1), (1, 0))
        sft = sft_loss(logprobs, batch.sft_mask) / batch.sft_mask.sum()
        self._metrics["train" if self.model.training else "eval"]["sft/nll"].append(float(sft))
        # TRL adds up the losses of a step's micro-batches.
        return (1 - self.mu) * loss + self.mu * sft / self.current_gradient_accumulation_steps


def sample(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    """TRL's `rollout_func` with UniAPL's sampler: what was sampled is what is trained, by token id."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    prompt_ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    settings = SamplingSettings(
        max_completion_length=trainer.max_completion_length,
        stop_ids={tokenizer.eos_token_id},
        temperature=trainer.temperature,
    )
    sampler = LocalSampler(model=model, settings=settings, pad_id=tokenizer.pad_token_id)
    process, step = trainer.accelerator.process_index, trainer.state.global_step
    seeds = [derive_seed(trainer.args.seed, step, process, number) for number in range(len(prompts))]
    # TRL repeats each prompt, so that every row has one completion and a seed of its own.
    groups = sampler.sample(SampleRequest(prompts=prompt_ids, seeds=seeds, num_generations=1))
    rollouts = [rollout for (rollout,) in groups]
    return {
        "prompt_ids": [list(ids) for ids in prompt_ids],
        "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
        "logprobs": [list(rollout.sampling_logprobs) for rollout in rollouts],
    }


def brevity(completions: Sequence[str], demonstration: Sequence[str], **_: Any) -> list[float]:
    """An example of a reward that can be gamed: completions no longer than the demonstration."""
    return [float(len(text) <= len(expert)) for text, expert in zip(completions, demonstration, strict=True)]


def main(model: str, path: str) -> None:
    """Train for ten steps."""
    trainer = MixedTrainer(
        model=model,
        reward_funcs=brevity,
        train_dataset=load_dataset("json", data_files=path, split="train"),
        args=GRPOConfig(
            output_dir="runs/trl",
            max_steps=10,
            beta=0.1,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=64,
            logging_steps=1,
            report_to=[],
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:3])
