"""Chat templates of model families, as TRL ships them, on a tokenizer with one token per byte."""

from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "lfm2_v2": "<|im_end|>",
    "glm4moe": "<|endoftext|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",  # noqa: RUF001 (the token's own characters)
    "deepseekv3": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "nemotron_3_nano": "<|im_end|>",
    "gptoss": "<|return|>",
    "smolvlm": "<end_of_utterance>",
}
"""Template -> the token that ends an answer."""
READ = {
    **{name: FAMILIES[name] for name in ("qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "llama3_2")},
    **{name: FAMILIES[name] for name in ("glm4moe", "nemotron_3_nano")},
    **dict.fromkeys(("qwen3_instruct_2507", "qwen3_6", "qwen3_8", "nemotron_3_super"), "<|im_end|>"),
    "gemma4_v5": "<turn|>",
}
"""The same for templates whose tool calls can be read."""


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(
    chat_template: str | None, eos: str = "<eos>", *, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of any text; with `bos` it begins every text with its first token, as Llama's does."""
    from tokenizers import processors

    names = ["<pad>", eos, "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token=eos, bos_token="<s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def family(name: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template(name), (FAMILIES | READ)[name])
