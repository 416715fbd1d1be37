"""Sampling time of several turns, with and without the caches of the turns before.

    OMP_NUM_THREADS=1 python benchmarks/turns.py [--model DIRECTORY] [--turns 4] [--repeats 3]

Samples 4 rollouts for each of 8 prompts of 128 tokens. Each turn has 32 tokens, each result of a tool 32.
Without a model, a random Qwen3 of 20 million parameters. Times are CPU seconds, because other processes may
use the machine; both ways run in turn after a warm-up.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from uniapl.rollout import SampleRequest
from uniapl.rollout.caches import RowCaches
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings

PROMPTS, ROWS, PROMPT, TOKENS = 8, 4, 128, 32
STOP = 1


@dataclass(frozen=True, kw_only=True)
class Planned(LocalSampler):
    """Ends every turn after the same number of tokens."""

    drawn: list[int] = field(default_factory=list[int])

    def _choose(self, logits: Tensor, uniforms: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, logprobs = super()._choose(logits, uniforms, history)
        self.drawn.append(1)
        return (tokens.clamp(min=2) if len(self.drawn) % TOKENS else tokens * 0 + STOP), logprobs


def run(sampler: LocalSampler, turns: int, caches: RowCaches | None) -> float:
    """CPU seconds of all turns."""
    prompts = [tuple(range(10 + n, 10 + n + PROMPT)) for n in range(PROMPTS)]
    request = SampleRequest(prompts=prompts, seeds=range(PROMPTS), num_generations=ROWS, caches=caches)
    contexts = [prompt for prompt in prompts for _ in range(ROWS)]
    begin = time.process_time()
    for turn in range(turns):
        rows = [rollout for group in sampler.sample(request) for rollout in group]
        contexts = [
            context + rollout.completion_ids + (7,) * TOKENS
            for context, rollout in zip(contexts, rows, strict=True)
        ]
        seeds = [turn * len(contexts) + number for number in range(len(contexts))]
        request = replace(request, prompts=contexts, seeds=seeds, num_generations=1)
    return time.process_time() - begin


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        shape = {"vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1_024}
        shape |= {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape))
    settings = SamplingSettings(max_completion_length=TOKENS + 1, stop_ids={STOP})
    sampler = Planned(model=model, settings=settings, pad_id=0)
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(options.repeats + 1):
        for cached in times:
            seconds = run(sampler, options.turns, RowCaches() if cached else None)
            if repeat:
                times[cached].append(seconds)
    again, cached = (statistics.median(times[kind]) for kind in (False, True))
    print(
        f"{options.turns} turns: read again {again:.2f} s, from caches {cached:.2f} s, {again / cached:.2f}x"
    )


if __name__ == "__main__":
    main()
