"""`uniapl chat MODEL`: a look at what a model answers."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from uniapl.config import ModelConfig
from uniapl.models.loading import ModelSource, load_model, load_stop_ids, load_tokenizer


def chat(arguments: Sequence[str]) -> None:
    """Answer each line that is typed or piped in, until the input ends.

    With a chat template it is a conversation; without one each line is a text to go on with.
    """
    options = _parser().parse_args(arguments)
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
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = tokenizer(line, return_tensors="pt")
        inputs = inputs.to(model.device)
        sampling = {"temperature": options.temperature} if options.temperature else {}
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            eos_token_id=sorted(stop_ids),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
        answer = output[0, inputs["input_ids"].shape[1] :]
        said = str(tokenizer.decode(answer, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": said})


def _lines() -> Iterator[str]:
    """What is asked, without empty lines; Ctrl-D, or the end of a pipe, ends it."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uniapl chat", description=chat.__doc__)
    parser.add_argument("model", help="a directory, such as a run's final/, or a Hub id")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser
