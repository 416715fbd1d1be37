"""`uniapl chat`: chat with a model in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from uniapl.config import ModelConfig
from uniapl.models.loading import ModelSource, load_model, load_stop_ids, load_tokenizer, pad_id_of


def chat(arguments: Sequence[str]) -> None:
    """Complete each line that is typed or piped in, until the input ends.

    A model with a chat template gets the whole conversation; a model without one continues each line.
    """
    options = _parse(arguments)
    config = ModelConfig(model_name_or_path=options.model, trust_remote_code=options.trust_remote_code)
    source = ModelSource.resolve(config)
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source).eval()
    stop_ids = load_stop_ids(source, model.config, tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in _lines():
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": line})
            line = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        inputs = tokenizer(line, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        inputs = inputs.to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad_id_of(tokenizer),
            streamer=streamer,
        )
        completion = output[0, inputs["input_ids"].shape[1] :]
        text = str(tokenizer.decode(completion, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text})


def _lines() -> Iterator[str]:
    """The non-empty lines of the input, until Ctrl-D or the end of a pipe."""
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> " if sys.stdin.isatty() else "").strip():
                yield line


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="uniapl chat", description=chat.__doc__)
    add = parser.add_argument
    add("model", help="directory, such as a run's final/, or Hub id")
    add("--system", help="system message")
    add("--temperature", type=float, default=0.7, help="sampling temperature; 0 takes the most likely token")
    add("--max-new-tokens", type=int, default=512, help="maximum number of tokens per completion")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser.parse_args(arguments)
