"""Train the base model of a demo task: `python benchmarks/demo_base_model.py OUTPUT [--task sentences]`.

sentences: a small Qwen3 is trained on texts of a sloppy writer, which are fluent but follow each constraint
only sometimes. A curriculum of texts that follow every constraint, with one, up to two and up to three
sentences, comes first: without it, a model of this size does not learn to copy words from its prompt.

tools: a smaller Qwen3 is trained on trajectories of a sloppy solver, which calls tools only sometimes, with
wrong arguments or in a form that cannot be read, and stops early. Its facts are drawn for each trajectory.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from uniapl.demo.arithmetic import draw_question
from uniapl.demo.constraints import TaskPrompt, draw_prompt
from uniapl.demo.language import NOUNS
from uniapl.demo.solvers import Sloppiness, solve_sloppily
from uniapl.demo.task import make_tokenizer
from uniapl.demo.tools import Part, make_tool_tokenizer, rendered
from uniapl.demo.writers import SLOPPY, Style, write

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
COPYING_STEPS = 1600
SLOPPY_STEPS = 1600
TOOL_STEPS = 1600
COPYING_KINDS = ("include", "place", "end", "twice")


def make_model(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 model with random parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 32,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            # Four times the default: attention to the prompt's words forms in a third of the steps.
            initializer_range=0.08,
            eos_token_id=tokenizer.get_vocab()["<eos>"],
            pad_token_id=tokenizer.get_vocab()["<pad>"],
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


def draw_text(rng: random.Random, progress: float) -> list[Part]:
    """A prompt and a text of the task with sentences.

    Args:
        progress: From 0 to 1; the first half is the curriculum.
    """
    if progress < COPYING_STEPS / (COPYING_STEPS + SLOPPY_STEPS):
        done = progress * (COPYING_STEPS + SLOPPY_STEPS) / COPYING_STEPS
        prompt, text = copying_pair(rng, most_sentences=1 + int(3 * done))
    else:
        prompt, text = sloppy_pair(rng)
    return [(f"<user> {prompt.text} <assistant> ", False), (f"{text} <eos>", True)]


def draw_trajectory(rng: random.Random, progress: float) -> list[Part]:
    """A question and a sloppy trajectory, as the chat template writes them."""
    question = draw_question(rng, NOUNS)
    return rendered(question, solve_sloppily(question, rng, Sloppiness()))


def batch_of(rows: list[list[Part]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded input ids, with labels on the trained parts only."""
    encoded = tokenizer([text for row in rows for text, _ in row]).input_ids
    parts = iter(encoded)
    sequences = [[(token, trained) for _, trained in row for token in next(parts)] for row in rows]
    width = max(map(len, sequences))
    padded = [sequence + [(-1, False)] * (width - len(sequence)) for sequence in sequences]
    ids = torch.tensor([[token for token, _ in row] for row in padded])
    trained = torch.tensor([[flag for _, flag in row] for row in padded])
    return {
        "input_ids": ids.clamp(min=0),
        "attention_mask": (ids >= 0).long(),
        "labels": ids.masked_fill(~trained, -100),
    }


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[random.Random, float], list[Part]],
    *,
    seed: int,
    steps: int,
) -> None:
    """Train the model on rows that `draw` draws, given the progress from 0 to 1."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    begin = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, 1.05 - step / steps)
        rows = [draw(rng, step / steps) for _ in range(BATCH_SIZE)]
        loss = model(**batch_of(rows, tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.process_time() - begin:.0f} s", flush=True)


def main() -> None:
    """Train and write the model directory."""
    parser = argparse.ArgumentParser(description="Train the base model of a demo task.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--task", choices=("sentences", "tools"), default="sentences")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Sums depend on the number of threads; one thread gives the same weights on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.task == "tools":
        tokenizer = make_tool_tokenizer()
        model = make_model(tokenizer, width=96, layers=3)
        pretrain(model, tokenizer, draw_trajectory, seed=arguments.seed, steps=TOOL_STEPS)
        # The file is half as large; training reads the weights as fp32.
        model.half()
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, width=128, layers=4)
        steps = COPYING_STEPS + SLOPPY_STEPS
        pretrain(model, tokenizer, draw_text, seed=arguments.seed, steps=steps)
    model.eval().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
