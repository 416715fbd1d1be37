"""A reward model as a reward function: a sequence classifier with one output (TRL's RewardTrainer)."""

import functools
import os
from typing import Any

from uniapl.errors import UsageError
from uniapl.files import expand_home
from uniapl.models.loading import from_pretrained, load_weights
from uniapl.rewards.finding import register


@register("reward_model")
def reward_model(
    prompts: list[Any],
    completions: list[Any],
    *,
    model: str,
    prompt_format: str = "text",
    batch_size: int = 16,
) -> list[float]:
    """The reward model's logit for each prompt and completion.

    The text is formatted as by TRL's GRPOTrainer: chats with the reward model's own template, plain strings
    unchanged. A logit has no fixed range, so choose its weight relative to other rewards. The weights are
    loaded in the first call, and `rewards.timeout` must allow for that.

    Args:
        model: Directory or Hub id of a sequence classifier with one output and its tokenizer.
        prompt_format: As in the section `data`: "chat" turns plain strings into messages.
        batch_size: Completions scored at a time.

    Raises:
        UsageError: The model cannot be loaded, or `prompt_format` is invalid.
    """
    import torch

    if prompt_format not in ("text", "chat"):
        raise UsageError(f"reward_model: prompt_format must be 'text' or 'chat', not '{prompt_format}'")
    classifier, tokenizer = _load(expand_home(model))

    def text(prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            if prompt_format == "text":
                return prompt + completion
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        # The content of a turn has the calls as they were written; the template would repeat them.
        completion = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in completion]
        if prompt[-1]["role"] == "assistant":
            # The completion continues this message.
            *prompt, begun = prompt
            first, *later = completion
            completion = [{**begun, **first, "content": begun["content"] + first["content"]}, *later]
        return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)

    texts = [text(*pair) for pair in zip(prompts, completions, strict=True)]
    logits: list[float] = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        ).to(classifier.device)
        with torch.no_grad():
            logits += classifier(**inputs).logits[:, 0].tolist()
    return logits


@functools.cache
def _load(name: str) -> tuple[Any, Any]:
    """The classifier, on the accelerator if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = from_pretrained(AutoTokenizer, "reward model's tokenizer", name)
    model: Any = load_weights(AutoModelForSequenceClassification, "reward model", name)
    if model.config.num_labels != 1:
        raise UsageError(f"'{name}' has {model.config.num_labels} outputs; a reward model must have one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    # With its index: reward functions run in their own thread, which would use device 0 in every process.
    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
    return model.eval().requires_grad_(False).to(device), tokenizer
