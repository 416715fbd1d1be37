"""Peak memory and time of chunked log-probabilities beside the full logits, forward and backward.

    python benchmarks/logprob_memory.py [--tokens 8192] [--vocabulary 151936] [--hidden 64] [--json FILE]

Each way runs in a process of its own, whose peak memory the operating system keeps; what the process holds
before it computes is taken off.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("full", "chunked")


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(way: str, tokens: int, vocabulary: int, hidden_size: int, sender: Any) -> None:
    """Send the bytes and seconds of one forward and backward pass."""
    import torch

    from uniapl.functional import selected_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    weight.data.div_(hidden_size**0.5)
    token_ids = torch.randint(0, vocabulary, (tokens,))
    temperature = torch.ones(tokens)
    # A small pass first: what the libraries themselves allocate does not count.
    selected_logprobs(hidden[:2], weight[:8], torch.zeros(2, dtype=torch.int64), temperature[:2])[
        0
    ].sum().backward()
    hidden.grad = weight.grad = None
    before, start = peak_bytes(), time.perf_counter()
    if way == "full":
        # The leanest full way: no entropy, no temperature, the logits freed once they are normalised.
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
    """Way -> bytes, seconds, and two numbers that must agree between the ways."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, float]] = {}
    for way in WAYS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(way, tokens, vocabulary, hidden_size, sender))
        process.start()
        sender.close()
        try:
            results[way] = receiver.recv()
        except EOFError:
            raise RuntimeError(
                f"the '{way}' process died (exit {process.exitcode}): out of memory?"
            ) from None
        finally:
            process.join()
    return results


def main() -> None:
    """Print the comparison, and write it where `--json` says."""
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
    for way, result in results.items():
        print(f"{way:>8}: peak {result['bytes'] / 2**30:6.2f} GiB   {result['seconds']:6.1f} s")
    print(f"   ratio: {results['chunked']['bytes'] / results['full']['bytes']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
