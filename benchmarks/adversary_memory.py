"""Peak memory and step time of a run with and without a discriminator on the same policy.

    python benchmarks/adversary_memory.py [--hidden 256] [--layers 8] [--vocabulary 32000] [--json FILE]

The benchmark runs four steps in each of three separate processes: without an adversary, with a discriminator
of LoRA adapters on the policy's weights, and with a discriminator that is a copy of the policy. The memory
that the process uses before training is subtracted.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"objective": {"lambda_adv": 0.0}},
    "adapters": {"discriminator": {"kind": "bradley-terry", "lora_r": 8}},
    "copy": {"discriminator": {"kind": "bradley-terry"}},
}


def peak_bytes() -> int:
    """Peak resident size of this process; getrusage would include the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def save_model(path: Path, options: argparse.Namespace) -> None:
    """Save a Qwen3 with random weights, and a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden // 4,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        path
    )


def measure(variant: str, model: str, sender: Any) -> None:
    """Run four steps; send the additional peak memory and the time of the last step."""
    from transformers.utils import logging

    import uniapl

    logging.disable_progress_bar()
    rows = [{"prompt": f"Count to {n}. " * 4, "completion": "one, two, " * 12} for n in range(32)]
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as output:
        recipe: dict[str, Any] = {
            "method": "uniapl",
            "output_dir": output,
            "overwrite": True,
            "max_steps": 4,
            "save_steps": 1000,
            "model": {"model_name_or_path": model},
            "rollout": {"num_generations": 8, "max_completion_length": 128},
            "batching": {
                "prompts_per_step": 4,
                "demonstrations_per_step": 8,
                "max_tokens_per_micro_batch": 4096,
            },
            "discriminator": {"warmup_steps": 0, "min_accuracy": 0.0},
        }
        for section, values in VARIANTS[variant].items():
            recipe[section] = {**recipe.get(section, {}), **values}
        with Path(output, "console").open("w") as quiet:
            sys.stdout = quiet
            result = uniapl.train(
                recipe,
                train_dataset=rows,
                reward_functions=[lambda completions: [float(len(set(text))) for text in completions]],
            )
            sys.stdout = sys.__stdout__
        sender.send({"bytes": peak_bytes() - before, "seconds": result.metrics["step_time"]})


def main() -> None:
    """Measure every variant in a separate process, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as model:
        save_model(Path(model), options)
        for variant in VARIANTS:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(variant, model, sender))
            process.start()
            sender.close()
            results[variant] = receiver.recv()
            process.join()
    for variant, result in results.items():
        ratio = result["bytes"] / results["none"]["bytes"]
        print(
            f"{variant:9s} {result['bytes'] / 2**20:7.0f} MiB  x {ratio:.3f}  "
            f"last step {result['seconds']:.2f} s"
        )
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "results": results}))


if __name__ == "__main__":
    main()
