"""Small models, tokenizers and rows that the tests make themselves: nothing is downloaded."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from uniapl.data.batching import Row

VOCABULARY = 64
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.\n"
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "mistral_sliding": MistralConfig(**SMALL, sliding_window=4),
    "gemma2_softcap": Gemma2Config(**SMALL, final_logit_softcapping=3.0, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=4),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
}


def make_model(family: str = "qwen3", *, seed: int = 0, scale: float = 4.0) -> PreTrainedModel:
    """A random model; `scale` sharpens its distributions so that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def make_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per letter; 0 pads, 1 ends."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<turn>": 3}
    vocabulary |= {letter: number for number, letter in enumerate(LETTERS, start=4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    fast.chat_template = chat_template
    return fast


def save_model(path: Path, *, family: str = "qwen3", chat_template: str | None = None, seed: int = 0) -> Path:
    """A model directory as a user would have it."""
    make_model(family, seed=seed, scale=1.0).save_pretrained(path)
    make_tokenizer(chat_template=chat_template).save_pretrained(path)
    return path


def random_rows(seed: int = 0, count: int = 9) -> list[Row]:
    """Demonstrations and rollouts of many lengths; some rollouts without a known reward or logit."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(integer(2, VOCABULARY) for _ in range(length))

    rows: list[Row] = []
    for number in range(count):
        prompt, completion = ids(integer(1, 9)), ids(integer(1, 12))
        if number % 3 == 0:
            rows.append(Row(prompt_ids=prompt, completion_ids=completion, components=frozenset({"sft"})))
            continue
        components = {"kl"} | ({"rl"} if number % 4 else set()) | ({"adv"} if number % 5 else set())
        rows.append(
            Row(
                prompt_ids=prompt,
                completion_ids=completion,
                components=frozenset(components),
                advantage=integer(-5, 6) / 4,
                adversarial_advantage=integer(-5, 6) / 10,
                temperature=0.7,
                sampling_logprobs=tuple(-integer(1, 30) / 10 for _ in completion),
                ref_logprobs=tuple(-integer(1, 30) / 10 for _ in completion),
            )
        )
    return rows


def paired_rows() -> list[Row]:
    """`random_rows` with pairs: two prompts with two rejected rollouts each, and a pair of the data."""
    rows, pref = random_rows(), frozenset({"pref"})

    def chosen(prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float) -> Row:
        ref_logprobs = tuple(-0.3 * n for n in range(1, len(ids) + 1))
        return Row(
            prompt_ids=prompt,
            completion_ids=ids,
            components=pref,
            temperature=temperature,
            ref_logprobs=ref_logprobs,
        )

    for first, ids in ((1, (9, 30, 41, 1)), (4, (50, 1))):
        prompt = rows[first].prompt_ids
        for number in (first, first + 1):
            pair = {"components": rows[number].components | pref, "chosen": chosen(prompt, ids, 0.7)}
            rows[number] = replace(rows[number], prompt_ids=prompt, **pair)
    prompt = rows[6].prompt_ids
    rows[6] = replace(chosen(prompt, (20, 21, 22, 1), 1.0), chosen=chosen(prompt, (33, 1), 1.0))
    return rows


def letter_rows(count: int = 12, *, demonstrated: Sequence[int] = range(0, 100, 2)) -> list[dict[str, Any]]:
    """Rows of a small task: three times a letter; every other row has a demonstration."""
    return [
        {"prompt": f"say {LETTERS[n % 26]}.", "letter": LETTERS[n % 26]}
        | ({"completion": LETTERS[n % 26] * 3} if n in demonstrated else {})
        for n in range(count)
    ]
