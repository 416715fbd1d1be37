"""Train the base model of the demo task: `python benchmarks/demo_base_model.py OUTPUT [--seed 0]`.

A small Qwen3 is trained on texts of a sloppy writer, which are fluent but follow each constraint only
sometimes. A curriculum of texts that follow every constraint, with one, up to two and up to three sentences,
comes first: without it, a model of this size does not learn to copy words from its prompt.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from uniapl.demo.constraints import TaskPrompt, draw_prompt
from uniapl.demo.task import SPECIAL_TOKENS, make_tokenizer
from uniapl.demo.writers import SLOPPY, Style, write

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
COPYING_STEPS = 1600
SLOPPY_STEPS = 1600
COPYING_KINDS = ("include", "place", "end", "twice")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 model with 0.8 million random parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            # Four times the default: attention to the prompt's words forms in a third of the steps.
            initializer_range=0.08,
            eos_token_id=SPECIAL_TOKENS.index("<eos>"),
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
            bos_token_id=None,
        )
    )


def copying_pair(rng: random.Random, most_sentences: int) -> tuple[TaskPrompt, str]:
    """A prompt with one extra constraint, and a text that satisfies all constraints."""
    clean = Style(**{**vars(SLOPPY), "faithful": 1.0})
    while True:
        prompt = draw_prompt(rng, kinds=(rng.choice(COPYING_KINDS),))
        if prompt.sentences <= most_sentences and (text := write(prompt, clean, rng)):
            return prompt, text


def sloppy_pair(rng: random.Random) -> tuple[TaskPrompt, str]:
    """A prompt, and a text of the sloppy writer."""
    while True:
        prompt = draw_prompt(rng)
        if text := write(prompt, SLOPPY, rng):
            return prompt, text


def batch_of(
    pairs: list[tuple[TaskPrompt, str]], tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """Right-padded input ids, with labels only on the texts."""
    rows: list[tuple[list[int], int]] = []
    for prompt, text in pairs:
        start = tokenizer(f"<user> {prompt.text} <assistant>").input_ids
        rows.append((start + tokenizer(f"{text} <eos>").input_ids, len(start)))
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.full_like(input_ids, -100)
    for row, (ids, start) in enumerate(rows):
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pretrain(
    seed: int, *, copying_steps: int = COPYING_STEPS, sloppy_steps: int = SLOPPY_STEPS
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The base model and its tokenizer."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    total = copying_steps + sloppy_steps

    def draw(step: int) -> tuple[TaskPrompt, str]:
        if step < copying_steps:
            return copying_pair(rng, most_sentences=1 + 3 * step // copying_steps)
        return sloppy_pair(rng)

    begin = time.monotonic()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, 1.05 - step / total)
        loss = model(**batch_of([draw(step) for _ in range(BATCH_SIZE)], tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == total - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.monotonic() - begin:.0f} s", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    """Train and write the model directory."""
    parser = argparse.ArgumentParser(description="Train the base model of the demo task.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Sums depend on the number of threads; one thread gives the same weights on every machine.
    torch.set_num_threads(1)
    model, tokenizer = pretrain(arguments.seed)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
