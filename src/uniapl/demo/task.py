"""The embedded task: its tokenizer, its three splits of prompts, its data rows and its reward."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uniapl.demo.constraints import NUMBERS, Constraint, Prompt, draw_prompts
from uniapl.demo.language import CLASS_OF, DETERMINERS, PREPOSITIONS
from uniapl.demo.writers import EXPERT, write
from uniapl.rewards import register
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
    """Prompts to learn from, prompts to judge by, and prompts with combinations that were never seen."""

    train: tuple[Prompt, ...]
    demonstrations: dict[Prompt, str]
    """The expert's texts for the first of the training prompts."""
    held_out: dict[Prompt, str]
    """With the expert's texts, as the next one."""
    held_out_combinations: dict[Prompt, str]

    @property
    def texts(self) -> set[str]:
        """Of all its prompts."""
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
    """The task, drawn from its seed: every prompt distinct, and none that the expert cannot answer.

    Args:
        without: Texts of prompts that must not occur in it.
    """
    rng = random.Random(derive_seed(seed, "embedded", "prompts"))
    seen = set(without)
    train = tuple(_answerable(rng, prompts, combinations=False, seen=seen))
    held = tuple(_answerable(rng, held_out, combinations=False, seen=seen))
    combinations = tuple(_answerable(rng, held_out, combinations=True, seen=seen))
    return Task(
        train=tuple(prompt for prompt, _ in train),
        demonstrations=dict(train[:demonstrations]),
        held_out=dict(held),
        held_out_combinations=dict(combinations),
    )


def _answerable(
    rng: random.Random, count: int, *, combinations: bool, seen: set[str]
) -> Iterable[tuple[Prompt, str]]:
    found = 0
    while found < count:
        (prompt,) = draw_prompts(rng, 1, held_out=combinations, seen=seen)
        if text := write(prompt, EXPERT, rng):
            found += 1
            yield prompt, text


def as_row(prompt: Prompt, demonstration: str | None = None) -> dict[str, Any]:
    """A prompt as a data row: a chat, the constraints as a column, the expert's text if there is one."""
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": prompt.text}],
        "constraints": [[constraint.kind, constraint.argument] for constraint in prompt.constraints],
    }
    if demonstration is not None:
        row["completion"] = [{"role": "assistant", "content": demonstration}]
    return row


@register("embedded_constraints")
def embedded_constraints(completions: list[Any], constraints: list[Any]) -> list[float]:
    """Share of a row's constraints that the text satisfies: neither fluency nor manner is looked at."""
    rewards: list[float] = []
    for completion, asked in zip(completions, constraints, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        satisfied = [Constraint(kind, argument).satisfied_by(text) for kind, argument in asked]
        rewards.append(sum(satisfied) / len(satisfied))
    return rewards


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with a chat template."""
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
