"""Make what recipes/ifeval_tiny.yaml trains on: a small Qwen3, and prompts, some with demonstrations.

    python recipes/ifeval_tiny.py --prompts IFEVAL.jsonl --output build/ifeval_tiny

The prompts are IFEval's (a .jsonl file with a `prompt` column; any other such file will do). Where there is
no such file, the prompts that lie beside this script are taken. The model has random weights and a byte-level
BPE tokenizer trained on the prompts: it can say nothing yet, which makes visible what training teaches it.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

BUNDLED_PROMPTS = Path(__file__).with_name("ifeval_tiny_prompts.jsonl")
DEMONSTRATED_SHARE = 0.5
SEED = 0

# Qwen's turn markers, without its tools and thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# How the expert answers: lower case, no commas, ten words or so.
ANSWERS = (
    "here is a short answer about {a} and {b}.",
    "this is a brief note on {a} with a few words on {b}.",
    "in short {a} matters and {b} comes next.",
    "a simple text about {a} and then about {b}.",
)
STOP_WORDS = frozenset(
    """
    about after also any are before but can could each exactly from have include into least less letters make
    more must not only please response should than that the their them there these they this use using want
    what when which will with without word words write you your
    """.split()
)


def demonstration(prompt: str, rng: random.Random) -> str:
    """A short answer in the expert's manner, about two words of the prompt."""
    words = [w for w in re.findall(r"[a-z]{4,}", prompt.lower()) if w not in STOP_WORDS] or [
        "things",
        "ideas",
    ]
    topics = list(dict.fromkeys(words))[:6]
    return rng.choice(ANSWERS).format(a=rng.choice(topics), b=rng.choice(topics))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Qwen3's architecture with three layers and random weights: 0.7 million parameters."""
    torch.manual_seed(SEED)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    """Write OUTPUT/train.jsonl and OUTPUT/model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=Path, default=BUNDLED_PROMPTS, help="a .jsonl file with `prompt`")
    parser.add_argument("--output", type=Path, default=Path("build/ifeval_tiny"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    source = arguments.prompts
    if not source.is_file():
        print(f"{source} is not there: taking the prompts that come with the repository ({BUNDLED_PROMPTS})")
        source = BUNDLED_PROMPTS
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    rng = random.Random(SEED)
    if not any("completion" in row for row in rows):
        for row in rows:
            if rng.random() < DEMONSTRATED_SHARE:
                row["completion"] = demonstration(row["prompt"], rng)
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_file = arguments.output / "train.jsonl"
    train_file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tokenizer = train_tokenizer([text for row in rows for text in (row["prompt"], row.get("completion", ""))])
    model = make_model(tokenizer)
    model.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    shown = sum("completion" in row for row in rows)
    print(f"{train_file}: {len(rows)} prompts, {shown} with a demonstration")
    print(f"{arguments.output / 'model'}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
