"""Peak memory and time of log-probabilities from chunked and from full logits, forward and backward.

    python benchmarks/logprob_memory.py [--tokens 8192] [--vocabulary 151936] [--hidden 64] [--json FILE]

Each variant runs in a separate process. The memory that the process uses before the computation is subtracted
from its peak.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

VARIANTS = ("full", "chunked")


def peak_bytes() -> int:
    """Peak resident size of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(variant: str, tokens: int, vocabulary: int, hidden_size: int, sender: Any) -> None:
    """Send the peak memory and time of one forward and backward pass."""
    import torch

    from uniapl.functional import selected_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    weight.data.div_(hidden_size**0.5)
    token_ids = torch.randint(0, vocabulary, (tokens,))
    temperature = torch.ones(tokens)
    # Do a small pass first, so that allocations of the libraries themselves are not counted.
    selected_logprobs(hidden[:2], weight[:8], torch.zeros(2, dtype=torch.int64), temperature[:2])[
        0
    ].sum().backward()
    hidden.grad = weight.grad = None
    before, start = peak_bytes(), time.perf_counter()
    if variant == "full":
        # The least memory that full logits need: no entropy, no temperature, logits freed after softmax.
        logprobs = torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, token_ids.unsqueeze(-1))
    else:
        logprobs, _ = selected_logprobs(hidden, weight, token_ids, temperature)
    logprobs.sum().backward()
    assert weight.grad is not None
    sender.send(
        {
            "bytes": peak_bytes() - before,
            "seconds": time.perf_counter() - start,
            "logprob_sum": float(logprobs.detach().double().sum()),
            "grad_norm": float(weight.grad.norm()),
        }
    )


def compare(tokens: int, vocabulary: int, hidden_size: int) -> dict[str, dict[str, float]]:
    """Return memory and time of each variant, and two values that must agree between the variants."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(variant, tokens, vocabulary, hidden_size, sender))
        process.start()
        sender.close()
        try:
            results[variant] = receiver.recv()
        except EOFError:
            raise RuntimeError(
                f"{variant}: the process exited with code {process.exitcode}; it may have run out of memory"
            ) from None
        finally:
            process.join()
    return results


def main() -> None:
    """Print the comparison, and write it to the file given by `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = compare(arguments.tokens, arguments.vocabulary, arguments.hidden)
    print(
        f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, hidden size {arguments.hidden}, fp32"
    )
    for variant, result in results.items():
        print(f"{variant:>8}: peak {result['bytes'] / 2**30:6.2f} GiB   {result['seconds']:6.1f} s")
    print(f"   ratio: {results['chunked']['bytes'] / results['full']['bytes']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
