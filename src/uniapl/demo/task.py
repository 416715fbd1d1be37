"""The data of the demo task: tokenizer, splits of prompts, data rows."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uniapl.demo.constraints import NUMBERS, TaskPrompt, draw_prompts
from uniapl.demo.language import CLASS_OF, DETERMINERS, PREPOSITIONS
from uniapl.demo.writers import EXPERT, write
from uniapl.types import derive_seed

PROMPT_WORDS = (
    "write sentence sentences about use do not include end with twice mention at most words "
    "place adjective adverb"
)
SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user> {{ message.content }} "
    "{% else %}{{ message.content }} <eos>{% endif %}"
    "{% if message.role == 'user' and (add_generation_prompt or not loop.last) %}<assistant> {% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Training prompts, held-out prompts, and prompts with held-out combinations of constraints."""

    train: tuple[TaskPrompt, ...]
    demonstrations: dict[TaskPrompt, str]
    """The expert's texts for the first training prompts."""
    held_out: dict[TaskPrompt, str]
    """Held-out prompts with the expert's texts."""
    held_out_combinations: dict[TaskPrompt, str]
    """Prompts with held-out combinations, with the expert's texts."""

    @property
    def texts(self) -> set[str]:
        """The texts of all prompts."""
        return {p.text for p in (*self.train, *self.held_out, *self.held_out_combinations)}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training prompts as data rows."""
        return [as_row(prompt, self.demonstrations.get(prompt)) for prompt in self.train]


def make_task(
    *,
    seed: int = 0,
    prompts: int = 1024,
    demonstrations: int = 256,
    held_out: int = 256,
    without: Iterable[str] = (),
) -> Task:
    """Draw the task from a seed: distinct prompts that the expert can answer.

    Args:
        without: Texts of prompts that must not occur.
    """
    rng = random.Random(derive_seed(seed, "embedded", "prompts"))
    seen = set(without)

    def draw(*, held_out: bool) -> Iterator[tuple[TaskPrompt, str]]:
        for prompt in draw_prompts(rng, held_out=held_out, seen=seen):
            if text := write(prompt, EXPERT, rng):
                yield prompt, text

    train = list(islice(draw(held_out=False), prompts))
    return Task(
        train=tuple(prompt for prompt, _ in train),
        demonstrations=dict(train[:demonstrations]),
        held_out=dict(islice(draw(held_out=False), held_out)),
        held_out_combinations=dict(islice(draw(held_out=True), held_out)),
    )


def as_row(prompt: TaskPrompt, demonstration: str | None = None) -> dict[str, Any]:
    """A data row: the prompt as a chat, the constraints as a column, the demonstration if there is one."""
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": prompt.text}],
        "constraints": [[constraint.kind, constraint.argument] for constraint in prompt.constraints],
    }
    if demonstration is not None:
        row["completion"] = [{"role": "assistant", "content": demonstration}]
    return row


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word and a chat template."""
    words = [*CLASS_OF, *PREPOSITIONS, *DETERMINERS, ".", *PROMPT_WORDS.split(), *NUMBERS.values()]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )
