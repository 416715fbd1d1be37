"""`uniapl pretrain-discriminator`: a POLAR-style discriminator on a backbone of yours."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification

from uniapl.config import Config, DataConfig, ModelConfig
from uniapl.data import rows as data
from uniapl.discriminator.polar import END, SEPARATOR, Polar, PolarFormat
from uniapl.errors import UniAPLError, UsageError
from uniapl.functional import bradley_terry_loss, learning_rate_factor
from uniapl.models.loading import (
    check_vocabulary,
    from_pretrained,
    load_model,
    load_stop_ids,
    load_tokenizer,
    refuse_adapter,
)
from uniapl.rollout.local import LocalSampler
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.distributed.accelerator import make_accelerator
from uniapl.types import Example, TokenIds, derive_seed

HELD_OUT_SHARE = 0.1
"""Of the prompts; the accuracy on them says whether it learned to tell policies or only their texts."""

Texts = list[list[str]]
"""Of one policy: per prompt, its answers."""


@dataclass(frozen=True, kw_only=True)
class Triple:
    """Two answers by one policy and one by another, all to the same prompt."""

    example: Example
    reference: str
    same: str
    other: str


def pretrain_discriminator(arguments: Sequence[str]) -> dict[str, Any]:
    """Sample from every policy, then learn which answers are by the same one.

    Bradley-Terry over (reference and candidate by one policy) against (the candidate by another). Source:
    POLAR (arXiv 2507.05197), pre-training, on a backbone and a pool of policies of any size.

    Returns:
        What `training.json` in the output directory holds.

    Raises:
        UniAPLError: The loss is no number any more.
        UsageError: Fewer than two policies, models or data that cannot be used, an occupied output directory.
    """
    options = _parse(arguments)
    if options.output_dir.exists():
        raise UsageError(f"'{options.output_dir}' is already there: choose another --output-dir")
    # It seeds the global generator too, which the new head is drawn from.
    device = make_accelerator(Config(seed=options.seed)).device
    console = Console(highlight=False)
    # First, so that what cannot be loaded costs no samples.
    for name in options.policies:
        load_tokenizer(ModelConfig(model_name_or_path=name))
    polar = _fresh(options.model_name_or_path, options.max_tokens, device)
    examples, texts = _write_all(options, device, console)
    held_out = {
        index
        for index, example in enumerate(examples)
        if derive_seed(options.seed, "held out", *example.prompt_ids) < HELD_OUT_SHARE * 2**63
    }
    learnt = _triples(examples, texts, set(range(len(examples))) - held_out, options.seed, "train")
    if next(learnt, None) is None:
        raise UsageError("no prompt is left to learn from beside the held-out tenth: give more prompts")
    optimizer = AdamW(polar.model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            factor = learning_rate_factor(step, "linear", warmup_steps=0, total_steps=options.steps)
            group["lr"] = options.learning_rate * factor
        batch = [next(learnt) for _ in range(options.batch_size)]
        same, other = _logits(polar, batch)
        loss = bradley_terry_loss(same, other) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(polar.model.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise UniAPLError(
                f"step {step + 1}: the loss or its gradient is not finite, nothing was written; try a lower "
                "--learning-rate"
            )
        optimizer.step()
        if (step + 1) % max(1, options.steps // 10) == 0:
            console.print(f"{step + 1}/{options.steps} loss {loss.item():.3f}")
    result: dict[str, Any] = {
        "policies": options.policies,
        "prompts": len(examples),
        "held_out_prompts": len(held_out),
        "held_out_accuracy": _accuracy(polar, examples, texts, held_out, options),
        "steps": options.steps,
        "seed": options.seed,
    }

    def fill(directory: Path) -> None:
        polar.model.save_pretrained(directory)
        polar.format.tokenizer.save_pretrained(directory)
        (directory / "training.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    checkpoint.write_directory(options.output_dir, fill)
    accuracy = result["held_out_accuracy"]
    known = "no prompt was held out" if accuracy is None else f"accuracy on held-out prompts {accuracy:.3f}"
    use = f"discriminator: {{kind: polar, model_name_or_path: {options.output_dir}}}"
    console.print(f"{known}; in a recipe, {use}", markup=False)
    return result


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl pretrain-discriminator",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="A frozen discriminator in POLAR's format, on a backbone of yours: it learns which "
        "answers are by the same policy, from what several policies (checkpoints, say) write. The expert's "
        "answers in the data are one more policy where a prompt has two of them.",
    )
    add = parser.add_argument
    add("data", help="prompts, and the expert's answers where there are some; as for train")
    add("--policies", nargs="+", required=True, help="directories or Hub ids of language models")
    add("--model-name-or-path", required=True, help="the backbone it starts from")
    add("--output-dir", type=Path, default=Path("runs/discriminator"), help="where it goes")
    add("--samples", type=int, default=2, help="answers of each policy to each prompt")
    add("--max-completion-length", type=int, default=256, help="tokens of an answer at most")
    add("--prompt-format", choices=("text", "chat"), default="text", help="as data.prompt_format")
    add("--steps", type=int, default=500, help="updates")
    add("--batch-size", type=int, default=32, help="triples of a step")
    add("--learning-rate", type=float, default=1e-5, help="falls to 0 by the last step")
    add("--max-tokens", type=int, default=16384, help="padded tokens of one forward pass")
    add("--seed", type=int, default=0, help="of all that is drawn")
    options = parser.parse_args(arguments)
    if options.samples < 2:
        raise UsageError("--samples must be at least 2: two answers of each policy are compared")
    for name in ("max_completion_length", "steps", "batch_size", "max_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= options.seed < 2**32:
        raise UsageError("--seed must be from 0 to 4,294,967,295")
    if not 0 < options.learning_rate < math.inf:
        raise UsageError("--learning-rate must be a positive number")
    return options


def _write_all(
    options: argparse.Namespace, device: torch.device, console: Console
) -> tuple[list[Example], list[Texts]]:
    """The prompts, and what every policy writes to them; the expert last, if the data has answers of it."""
    config = DataConfig(path=options.data, prompt_format=options.prompt_format)
    rows = data.read_rows(config)
    everything: tuple[Example, ...] = ()
    written: list[Texts] = []
    for name in options.policies:
        asked = {example.row for example in _distinct(everything)}
        found, answers = _write(name, rows, asked, config, options, device)
        everything = everything or found
        if [example.row for example in found] != [example.row for example in everything]:
            raise UsageError(
                f"'{name}' cannot use the same rows as '{options.policies[0]}' (window, template)"
            )
        written.append(answers)
        console.print(f"{name}: {options.samples} answers to each of {len(answers)} prompts", markup=False)
    examples = _distinct(everything)
    # As policies' answers are decoded: the data's own text lacks what a chat template writes around it.
    decode: Any = load_tokenizer(ModelConfig(model_name_or_path=options.policies[0])).decode
    expert: dict[TokenIds, list[str]] = {example.prompt_ids: [] for example in examples}
    for example in everything:
        if example.demonstration is not None:
            text: Any = decode(list(example.demonstration_ids or ()), skip_special_tokens=True)
            expert[example.prompt_ids].append(text)
    written.append([expert[example.prompt_ids] for example in examples])
    return examples, written


def _write(
    name: str,
    rows: Sequence[tuple[int, Any]],
    asked: set[int],
    config: DataConfig,
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[tuple[Example, ...], Texts]:
    """The rows as one policy reads them, and its answers to those that are asked; none: to distinct prompts.

    Which prompts are distinct is for the first policy to say: another one's tokenizer may see no difference.
    """
    where = ModelConfig(model_name_or_path=name)
    tokenizer: Any = load_tokenizer(where)
    model: Any = load_model(where)
    check_vocabulary(model, tokenizer)
    stop_ids = load_stop_ids(where, model.config, tokenizer)
    with data.named_source(config.path):
        examples = data.tokenize_rows(
            rows,
            tokenizer,
            config,
            stop_ids=stop_ids,
            context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            max_completion_length=options.max_completion_length,
        ).examples
    prompts = [example for example in examples if example.row in asked] or _distinct(examples)
    experts = Counter(example.prompt_ids for example in examples if example.demonstration is not None)
    if len(options.policies) == 1 and max(experts.values(), default=0) < 2:
        raise UsageError(
            "two policies with two answers to the same prompt at least: name more in --policies, or give "
            "data with several answers of the expert's to a prompt"
        )
    sampler = LocalSampler(
        model=model.to(device),
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_completion_length=options.max_completion_length,
    )
    groups = sampler.sample(
        [example.prompt_ids for example in prompts],
        seeds=[derive_seed(options.seed, "sample", name, example.row) for example in prompts],
        num_generations=options.samples,
        policy_version=0,
    )
    return examples, [
        [tokenizer.decode(list(r.completion_ids), skip_special_tokens=True) for r in group]
        for group in groups
    ]


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of each prompt, in the rows' order."""
    found: dict[TokenIds, Example] = {}
    for example in examples:
        found.setdefault(example.prompt_ids, example)
    return list(found.values())


def _fresh(backbone: str, max_tokens: int, device: torch.device) -> Polar:
    """A classifier with a new head on the backbone, whose tokenizer knows POLAR's two tokens."""
    tokenizer: Any = load_tokenizer(ModelConfig(model_name_or_path=backbone))
    refuse_adapter("backbone", backbone)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [SEPARATOR, END]}, replace_extra_special_tokens=False
    )
    model = from_pretrained(
        AutoModelForSequenceClassification.from_pretrained,
        "backbone",
        backbone,
        num_labels=1,
        dtype=torch.float32,
        use_safetensors=True,
    )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    form = PolarFormat.within(tokenizer, model.config)
    return Polar(model=model.eval().to(device), format=form, max_tokens=max_tokens)


def _triples(
    examples: Sequence[Example], texts: Sequence[Texts], prompts: set[int], seed: int, name: str
) -> Iterator[Triple]:
    """An endless draw: a prompt, and two policies with two answers to it at least.

    A policy with one answer, as the expert mostly is, takes no part: it could only ever be the other one, and
    what would be learned is that it loses.
    """
    pairs = [
        (prompt, policy)
        for prompt in sorted(prompts)
        for policy, answers in enumerate(texts)
        if len(answers[prompt]) > 1 and any(len(o[prompt]) > 1 for n, o in enumerate(texts) if n != policy)
    ]
    generator = torch.Generator().manual_seed(derive_seed(seed, "triples", name))

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    while pairs:
        prompt, policy = pairs[draw(len(pairs))]
        own = texts[policy][prompt]
        first, second = torch.randperm(len(own), generator=generator)[:2].tolist()
        others = [
            answers[prompt] for n, answers in enumerate(texts) if n != policy and len(answers[prompt]) > 1
        ]
        chosen = others[draw(len(others))]
        yield Triple(
            example=examples[prompt], reference=own[first], same=own[second], other=chosen[draw(len(chosen))]
        )


def _logits(polar: Polar, batch: Sequence[Triple]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the candidates by the reference's policy, and of those by the other one."""
    logits = polar.logits(
        [
            polar.format.text(triple.example.prompt, triple.reference, candidate)
            for triple in batch
            for candidate in (triple.same, triple.other)
        ]
    )
    return logits[::2], logits[1::2]


@torch.no_grad()
def _accuracy(
    polar: Polar,
    examples: Sequence[Example],
    texts: Sequence[Texts],
    prompts: set[int],
    options: argparse.Namespace,
) -> float | None:
    """On held-out prompts: how often the candidate by the same policy has the higher logit; a tie is half."""
    draw = _triples(examples, texts, prompts, options.seed, "held out")
    batch = [triple for triple, _ in zip(draw, range(8 * options.batch_size), strict=False)]
    if not batch:
        return None
    same, other = _logits(polar, batch)
    return float(torch.where(same == other, 0.5, (same > other).float()).mean())
