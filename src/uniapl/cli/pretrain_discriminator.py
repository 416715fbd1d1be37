"""`uniapl pretrain-discriminator`: train a POLAR-style discriminator on a backbone of your choice."""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification

from uniapl.config import Config, DataConfig, ModelConfig, RolloutConfig
from uniapl.data.reading import named_source, read_rows
from uniapl.data.rows import tokenize_rows
from uniapl.data.tokenization import without_end
from uniapl.discriminator.polar import END, SEPARATOR, Polar, PolarFormat
from uniapl.errors import UniAPLError, UsageError
from uniapl.functional import bradley_terry_loss
from uniapl.models.generation import unused_generation_settings
from uniapl.models.loading import (
    ModelSource,
    check_policy,
    check_vocabulary,
    load_model,
    load_stop_ids,
    load_tokenizer,
    load_weights,
    pad_id_of,
    refuse_adapter,
)
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.checkpoint.directory import write_directory
from uniapl.training.distributed.accelerator import make_accelerator
from uniapl.types import Example, TokenIds, derive_seed

HELD_OUT_FRACTION = 0.1
"""Fraction of the prompts; accuracy on them shows whether the model generalizes or memorized texts."""

Texts = list[list[str]]
"""A policy's completions, per prompt."""


class Triple(NamedTuple):
    """Two completions of one policy and one of another, all for the same prompt."""

    example: Example
    reference: str
    same: str
    other: str


def pretrain_discriminator(arguments: Sequence[str]) -> dict[str, Any]:
    """Sample from every policy, then train a classifier of whether completions come from the same policy.

    Bradley-Terry loss of (reference, candidate of the same policy) over (reference, candidate of another
    policy). Source: pre-training of POLAR (arXiv 2507.05197).

    Returns:
        The content of `training.json` in the output directory.

    Raises:
        UniAPLError: The loss is not finite.
        UsageError: There are fewer than two policies, a model or the data cannot be used, or the output
            directory exists.
    """
    options = _parse(arguments)
    if options.output_dir.exists():
        raise UsageError(f"--output-dir '{options.output_dir}' already exists: choose another directory")
    # make_accelerator also seeds the global generator, from which the new head is drawn.
    device = make_accelerator(Config(seed=options.seed)).device
    console = Console(highlight=False)
    # Load before sampling, so that a wrong name fails early.
    for name in options.policies:
        load_tokenizer(_source(name))
        check_policy(_source(name), ModelConfig())
    polar = _new_classifier(options.model_name_or_path, options.max_tokens, device)
    examples, texts = _sample_all(options, device, console)
    held_out = {
        index
        for index, example in enumerate(examples)
        if derive_seed(options.seed, "held out", *example.prompt_ids) < HELD_OUT_FRACTION * 2**63
    }
    triples = _triples(examples, texts, set(range(len(examples))) - held_out, options.seed, "train")
    if next(triples, None) is None:
        raise UsageError("no prompt is left for training after a tenth was held out: add prompts")
    _train(polar, triples, options, console)
    accuracy = _accuracy(polar, _triples(examples, texts, held_out, options.seed, "held out"), options)
    result: dict[str, Any] = {
        "policies": options.policies,
        "prompts": len(examples),
        "held_out_prompts": len(held_out),
        "held_out_accuracy": accuracy,
        "steps": options.steps,
        "seed": options.seed,
    }

    def fill(directory: Path) -> None:
        polar.model.save_pretrained(directory)
        polar.format.tokenizer.save_pretrained(directory)
        (directory / "training.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    write_directory(options.output_dir, fill)
    known = "no prompt was held out" if accuracy is None else f"accuracy on held-out prompts: {accuracy:.3f}"
    use = f"discriminator: {{kind: polar, model_name_or_path: {options.output_dir}}}"
    console.print(f"{known}; use it in a recipe as {use}", markup=False)
    return result


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl pretrain-discriminator",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a discriminator in POLAR's format, to be used frozen. It is trained on "
        "completions of several policies (for example, checkpoints) to recognize those of the same policy. "
        "The data's demonstrations count as one more policy for prompts that have at least two.",
    )
    add = parser.add_argument
    add("data", help="prompts, with or without demonstrations, in the same format as for train")
    add("--policies", nargs="+", required=True, metavar="MODEL", help="directories or Hub ids")
    add("--model-name-or-path", required=True, help="backbone to start from")
    add("--output-dir", type=Path, default=Path("runs/discriminator"), help="directory to create")
    add("--samples", type=int, default=2, help="completions per policy and prompt, at least 2")
    add("--max-completion-length", type=int, default=256, metavar="N", help="maximum tokens of a completion")
    add("--prompt-format", choices=("text", "chat"), default="text", help="same as data.prompt_format")
    add("--steps", type=int, default=500, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="triples per step")
    add("--learning-rate", type=float, default=1e-5, help="initial learning rate, decays linearly to 0")
    add("--max-tokens", type=int, default=16384, help="maximum padded tokens of a forward pass")
    add("--seed", type=int, default=0, help="seed of sampling, triples and the new head")
    options = parser.parse_args(arguments)
    for name in ("samples", "max_completion_length", "steps", "batch_size", "max_tokens"):
        least = 2 if name == "samples" else 1
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= options.seed < 2**32:
        raise UsageError("--seed must be from 0 to 4,294,967,295")
    if not 0 < options.learning_rate < math.inf:
        raise UsageError("--learning-rate must be a positive number")
    return options


def _sample_all(
    options: argparse.Namespace, device: torch.device, console: Console
) -> tuple[list[Example], list[Texts]]:
    """The distinct prompts, and every policy's completions; the last policy is the demonstrations."""
    config = DataConfig(path=options.data, prompt_format=options.prompt_format)
    rows = read_rows(config)
    everything: tuple[Example, ...] = ()
    texts: list[Texts] = []
    for name in options.policies:
        # The first policy decides which prompts are distinct: another tokenizer may map two to the same ids.
        wanted = {example.row for example in _distinct(everything)}
        examples, completions = _sample(name, rows, wanted, config, options, device)
        everything = everything or examples
        if [example.row for example in examples] != [example.row for example in everything]:
            raise UsageError(
                f"'{name}' cannot use the same rows as '{options.policies[0]}' (window, chat template)"
            )
        texts.append(completions)
        sampling = RolloutConfig(max_completion_length=options.max_completion_length)
        for note in unused_generation_settings(_source(name).base, None, [sampling]):
            console.print(f"note: {name}: {note}", markup=False)
        console.print(f"{name}: {len(completions)} prompts, {options.samples} completions each", markup=False)
    # Decoded like the completions: the data's own text lacks what a chat template adds around it.
    decode: Any = load_tokenizer(_source(options.policies[0])).decode
    demonstrations: dict[TokenIds, list[str]] = {example.prompt_ids: [] for example in everything}
    for example in everything:
        if example.demonstration is not None:
            # Without the end token, which differs between policies and need not be a special token.
            text = decode(list(example.demonstration_ids or ())[:-1], skip_special_tokens=True)
            demonstrations[example.prompt_ids].append(text)
    return _distinct(everything), [*texts, list(demonstrations.values())]


def _sample(
    name: str,
    rows: Sequence[tuple[int, Any]],
    wanted: set[int],
    config: DataConfig,
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[tuple[Example, ...], Texts]:
    """One policy's tokenized rows, and its completions for the wanted rows (none: for distinct prompts)."""
    source = _source(name)
    tokenizer: Any = load_tokenizer(source)
    model: Any = load_model(source)
    check_vocabulary(model, tokenizer)
    stop_ids = load_stop_ids(source, model.config, tokenizer)
    with named_source(rows):
        examples = tokenize_rows(
            rows,
            tokenizer,
            config,
            stop_ids=stop_ids,
            context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            max_completion_length=options.max_completion_length,
        ).examples
    demonstrated = Counter(example.prompt_ids for example in examples if example.demonstration is not None)
    if len(options.policies) == 1 and max(demonstrated.values(), default=0) < 2:
        raise UsageError(
            "at least two policies with two completions for the same prompt are needed: add a policy to "
            "--policies, or data with several demonstrations per prompt"
        )
    sampler = LocalSampler(
        model=model.to(device),
        settings=SamplingSettings(max_completion_length=options.max_completion_length, stop_ids=stop_ids),
        pad_id=pad_id_of(tokenizer),
    )
    prompts = [example for example in examples if example.row in wanted] or _distinct(examples)
    groups = sampler.sample(
        SampleRequest(
            prompts=[example.prompt_ids for example in prompts],
            seeds=[derive_seed(options.seed, "sample", name, example.row) for example in prompts],
            num_generations=options.samples,
        )
    )

    def text(ids: TokenIds) -> str:
        return tokenizer.decode(list(without_end(ids, stop_ids)), skip_special_tokens=True)

    return examples, [[text(rollout.completion_ids) for rollout in group] for group in groups]


def _source(name: str) -> ModelSource:
    return ModelSource.resolve(ModelConfig(model_name_or_path=name))


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of each prompt, in the order of the rows."""
    found: dict[TokenIds, Example] = {}
    for example in examples:
        found.setdefault(example.prompt_ids, example)
    return list(found.values())


def _new_classifier(backbone: str, max_tokens: int, device: torch.device) -> Polar:
    """The backbone with a new head, and its tokenizer with POLAR's two special tokens."""
    refuse_adapter("backbone", backbone)
    tokenizer: Any = load_tokenizer(ModelSource(base=backbone))
    special = {"additional_special_tokens": [SEPARATOR, END]}
    tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    model = load_weights(
        AutoModelForSequenceClassification, "backbone", backbone, new_head=True, num_labels=1
    )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    form = PolarFormat.within(tokenizer, model.config)
    return Polar(model=model.eval().to(device), format=form, max_tokens=max_tokens)


def _triples(
    examples: Sequence[Example], texts: Sequence[Texts], prompts: set[int], seed: int, name: str
) -> Iterator[Triple]:
    """Random triples without end; empty if no prompt has two policies with two completions each.

    A policy with one completion, as most demonstrations, is left out: it could only be `other`, and the
    classifier would learn that it always loses.
    """
    usable = {
        prompt: [policy for policy, completions in enumerate(texts) if len(completions[prompt]) > 1]
        for prompt in sorted(prompts)
    }
    pairs = [(prompt, policy) for prompt, those in usable.items() if len(those) > 1 for policy in those]
    generator = torch.Generator().manual_seed(derive_seed(seed, "triples", name))

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    while pairs:
        prompt, policy = pairs[draw(len(pairs))]
        own = texts[policy][prompt]
        first, second = torch.randperm(len(own), generator=generator)[:2].tolist()
        others = [texts[other][prompt] for other in usable[prompt] if other != policy]
        chosen = others[draw(len(others))]
        yield Triple(examples[prompt], own[first], own[second], chosen[draw(len(chosen))])


def _train(polar: Polar, triples: Iterator[Triple], options: argparse.Namespace, console: Console) -> None:
    optimizer = AdamW(polar.model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    for step in range(1, options.steps + 1):
        same, other = _logits(polar, list(itertools.islice(triples, options.batch_size)))
        loss = bradley_terry_loss(same, other) / options.batch_size
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(polar.model.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise UniAPLError(
                f"step {step}: the loss or its gradient is not finite; nothing was written. Lower "
                "--learning-rate"
            )
        optimizer.step()
        schedule.step()
        if step % max(1, options.steps // 10) == 0:
            console.print(f"{step}/{options.steps} loss {loss.item():.3f}")


def _logits(polar: Polar, batch: Sequence[Triple]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the candidates by the reference's policy, and of those by another policy."""
    texts = [
        polar.format.text(example.prompt, reference, candidate)
        for example, reference, *candidates in batch
        for candidate in candidates
    ]
    logits = polar.logits(texts)
    return logits[::2], logits[1::2]


@torch.no_grad()
def _accuracy(polar: Polar, triples: Iterator[Triple], options: argparse.Namespace) -> float | None:
    """How often the candidate by the reference's policy has the higher logit; a tie counts half."""
    batch = list(itertools.islice(triples, 8 * options.batch_size))
    if not batch:
        return None
    same, other = _logits(polar, batch)
    return float(torch.where(same == other, 0.5, (same > other).float()).mean())
