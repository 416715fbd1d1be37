"""Sampling time of the fused decoder, the plain decoder and transformers' `generate`.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [--sizes demo medium wide] [--repeats 5] [--json FILE]

The plain decoder uses the model's own forward. All three sample 8 completions for each of 8 prompts from
the same weights. Every completion ends at a planned length (log-normal, 40 % of the limit on average), so
that all three do the same work. They run in turn after a warm-up. Times are CPU seconds, because other
processes may use the machine. The floor is the time of the unfinished rows' multiplications and additions at
the measured rate of a matrix product with that many rows.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, Qwen3Config

from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings

GENERATIONS = 8
STOP = 1
OTHER = 2
"""Token that replaces a stop token drawn before the planned end."""


@dataclass(frozen=True)
class Size:
    """A model and the size of the sampling task."""

    settings: dict[str, int] | None
    """Configuration of a random Qwen3; None for the demo model."""
    prompts: int
    prompt_length: int
    new_tokens: int


MEDIUM = {
    "vocab_size": 32_000,
    "hidden_size": 384,
    "intermediate_size": 1_024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
SIZES = {
    "demo": Size(None, prompts=8, prompt_length=24, new_tokens=96),
    "medium": Size(MEDIUM, prompts=8, prompt_length=64, new_tokens=128),
    "wide": Size(
        MEDIUM | {"vocab_size": 151_936, "hidden_size": 128, "num_hidden_layers": 1},
        prompts=8,
        prompt_length=64,
        new_tokens=32,
    ),
}


class PlannedSampler(LocalSampler):
    """Ends each completion at its planned length: a uniform number of 2 marks the stop token."""

    def _uniforms(self, seeds: list[int], num_generations: int) -> Tensor:
        uniforms = super()._uniforms(seeds, num_generations)
        # The seeds are the indices of the prompts.
        lengths = torch.cat([planned(self.max_completion_length)[seed] for seed in seeds])
        return uniforms.scatter(1, (lengths - 1).unsqueeze(-1), 2.0)

    def _choose(self, logits: Tensor, uniforms: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, logprobs = super()._choose(logits, uniforms.clamp(max=0.5), history)
        tokens = torch.where(tokens == STOP, OTHER, tokens)
        return torch.where(uniforms > 1, STOP, tokens), logprobs


class PlannedEnd(LogitsProcessor):
    """Ends each completion of `generate` at its planned length."""

    def __init__(self, lengths: Tensor, prompt_length: int) -> None:
        self.lengths, self.prompt_length = lengths, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = input_ids.shape[1] - self.prompt_length + 1 >= self.lengths
        scores[:, STOP] = torch.where(ends, 1e9, -1e9)
        return scores


def planned(new_tokens: int, prompts: int = 8) -> Tensor:
    """Lengths of all completions [prompts, G]: log-normal, 40 % of the limit on average."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.6
    noise = torch.randn(prompts, GENERATIONS, generator=generator)
    lengths = (spread * noise).exp() * 0.4 * new_tokens / math.exp(spread**2 / 2)
    return lengths.round().long().clamp(1, new_tokens)


def load(size: Size) -> Any:
    """Load or create the model."""
    torch.manual_seed(0)
    if size.settings is None:
        return AutoModelForCausalLM.from_pretrained(str(files("uniapl.demo") / "base")).eval()
    config = Qwen3Config(**size.settings, eos_token_id=STOP, pad_token_id=0, tie_word_embeddings=True)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_config(config).eval()


def decoders(model: Any, size: Size) -> dict[str, Callable[[], Sequence[int]]]:
    """Return a sampling function per decoder; each returns the completion lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        3, model.config.vocab_size, (size.prompts, size.prompt_length), generator=generator
    )
    lengths = planned(size.new_tokens).flatten()
    sampling = SamplingSettings(max_completion_length=size.new_tokens, stop_ids={STOP})

    def ours(decoding: str) -> Callable[[], Sequence[int]]:
        sampler = PlannedSampler(model=model, settings=sampling, pad_id=0, decoding=decoding)

        def run() -> Sequence[int]:
            groups = sampler.sample(
                SampleRequest(
                    prompts=[tuple(prompt) for prompt in prompts.tolist()],
                    seeds=range(size.prompts),
                    num_generations=GENERATIONS,
                )
            )
            return [len(rollout.completion_ids) for group in groups for rollout in group]

        return run

    def generate() -> Sequence[int]:
        output = model.generate(
            prompts.repeat_interleave(GENERATIONS, dim=0),
            attention_mask=torch.ones(len(lengths), size.prompt_length, dtype=torch.int64),
            do_sample=True,
            top_k=0,
            max_new_tokens=size.new_tokens,
            logits_processor=[PlannedEnd(lengths, size.prompt_length)],
        )
        completions = output[:, size.prompt_length :]
        return [(row == STOP).nonzero()[0].item() + 1 if STOP in row else len(row) for row in completions]

    return {"fused": ours("fused"), "plain": ours("plain"), "generate": generate}


def floor(model: Any, size: Size) -> dict[str, float]:
    """FLOPs of the matrix products, and the seconds that they would take at the measured rate."""
    lengths = planned(size.new_tokens).flatten()
    layers, head = model.model.layers, model.lm_head.weight
    linear = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    flops = 2 * linear * size.prompts * size.prompt_length
    seconds = flops / rate(model, size.prompts * size.prompt_length)
    for position in range(size.new_tokens):
        rows = int((lengths > position).sum())
        if not rows:
            break
        # Attention over the cache: two products per head, for the scores and the weighted sum of the values.
        heads, head_dim = model.config.num_attention_heads, model.config.head_dim
        attention = 2 * len(layers) * heads * head_dim * (size.prompt_length + position)
        work = 2 * rows * (linear + head.numel() + attention)
        flops += work
        seconds += work / rate(model, rows)
    return {"flops": flops, "seconds": seconds}


RATES: dict[tuple[int, int], float] = {}


def rate(model: Any, rows: int) -> float:
    """FLOP/s of this model's largest matrix product, for `rows` rounded to a power of two."""
    rows = 2 ** round(math.log2(rows))
    weight = model.model.layers[0].mlp.gate_proj.weight.detach().T.contiguous()
    key = (len(weight), rows)
    if key not in RATES:
        x = torch.randn(rows, len(weight))
        repeats = max(1, int(1e8 / (rows * weight.numel())))
        best = math.inf
        for _ in range(10):
            start = time.process_time()
            for _ in range(repeats):
                x @ weight
            best = min(best, (time.process_time() - start) / repeats)
        RATES[key] = 2 * rows * weight.numel() / best
    return RATES[key]


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """Measure all decoders in turn, and compute the floor."""
    model = load(size)
    runs = decoders(model, size)
    wanted = planned(size.new_tokens).flatten().tolist()
    for name, run in runs.items():
        assert list(run()) == wanted, f"{name}: completion lengths differ from the planned ones"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(wanted),
        "seconds": seconds,
        "floor": floor(model, size),
    }


def main() -> None:
    """Print a table, and write the results to the file given by `--json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for name in options.sizes:
            results[name] = found = measure(SIZES[name], options.repeats)
            print(f"{name}: {found['parameters']:,} parameters, {found['tokens']:,} tokens")
            baseline = found["seconds"]["generate"]
            for decoder, seconds in found["seconds"].items():
                middle = statistics.median(seconds)
                times = statistics.median(b / s for b, s in zip(baseline, seconds, strict=True))
                print(
                    f"{decoder:>10}: {middle:7.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]"
                    f"{found['tokens'] / middle:9.0f} tokens/s   {times:5.2f} x the speed of generate"
                )
            print(f"{'floor':>10}: {found['floor']['seconds']:7.3f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
