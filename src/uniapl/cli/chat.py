"""`uniapl chat`: chat with a model in the terminal."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from uniapl.cli.run_settings import settings_of_run
from uniapl.config import Config, DataConfig
from uniapl.config.resolve import resolve
from uniapl.data.rendering import ChatTemplate
from uniapl.data.tokenization import encode_prompt
from uniapl.errors import UsageError
from uniapl.models.generation import unused_generation_settings
from uniapl.models.loading import ModelSource, load_model, load_stop_ids, load_tokenizer, pad_id_of
from uniapl.rollout.settings import SamplingSettings

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings")


def chat(arguments: Sequence[str]) -> None:
    """Complete each line that is typed or piped in, until the input ends.

    A model with a chat template gets the whole conversation; a model without one continues each line. A
    model in a run directory gets prompts as in training: with the run's system prompt and template arguments,
    or as plain text. The sampling flags mean what the keys of evaluation mean. Of
    generation_config.json only the end tokens are used, as in training and evaluation.
    """
    options = _parse(arguments)
    config = _config(options)
    source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source).eval()
    stop_ids = load_stop_ids(source, model.config, tokenizer)
    settings = SamplingSettings.of_evaluation(config, stop_ids, tokenizer)
    for note in unused_generation_settings(source.base, source.revision, [config.evaluation]):
        print(f"note: {note}", file=sys.stderr)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    # Otherwise generate() would apply the model's own top_k, repetition_penalty and so on.
    model.generation_config = GenerationConfig()
    data = _prompt_settings(options, has_template=tokenizer.chat_template is not None)
    template = None
    if data.prompt_format == "chat":
        template = ChatTemplate(tokenizer=tokenizer, arguments=data.chat_template_kwargs)
    if (run := settings_of_run(options.model)) is not None and run.tools:
        print(
            f"note: chat neither shows nor calls the tools of {run.file}; `uniapl evaluate` does",
            file=sys.stderr,
        )
    messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in _lines():
        if template is None:
            ids = encode_prompt(line, tokenizer)
        else:
            messages.append({"role": "user", "content": line})
            ids = tokenizer(template.render(messages), add_special_tokens=False).input_ids
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=settings.max_completion_length,
            do_sample=settings.temperature > 0,
            top_k=0 if settings.temperature > 0 else None,
            logits_processor=settings.processors,
            stopping_criteria=_stopping_criteria(settings, len(ids)),
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad_id_of(tokenizer),
            streamer=streamer,
        )
        completion = output[0, len(ids) :]
        text = str(tokenizer.decode(completion, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text})


def _stopping_criteria(settings: SamplingSettings, start: int) -> StoppingCriteriaList:
    """The stop strings, searched after the first `start` tokens."""
    strings = settings.stop_strings
    if strings is None:
        return StoppingCriteriaList()

    def ended(ids: torch.Tensor, _: Any) -> torch.Tensor:
        windows = strings.windows(len(ids), ids.device)
        return strings.complete(torch.cat([windows, ids[:, start:]], dim=1)[:, -strings.width :])

    return StoppingCriteriaList([ended])  # type: ignore[list-item]


def _config(options: argparse.Namespace) -> Config:
    """The model and how it is sampled, with the stop strings of the run that saved it."""
    run = settings_of_run(options.model)
    values = vars(options)
    sampling: dict[str, Any] = {key: values[key] for key in SAMPLING if values[key] is not None}
    if run is not None and "stop_strings" not in sampling:
        sampling["stop_strings"] = run.stop_strings
        if run.stop_strings:
            print(f"note: stop strings as in {run.file}: {list(run.stop_strings)}", file=sys.stderr)
    model = {key: values[key] for key in ("trust_remote_code", "chat_template_path", "stop_tokens")}
    return resolve(
        {
            "model": {"model_name_or_path": options.model, **model},
            "evaluation": {"max_completion_length": options.max_new_tokens, **sampling},
        }
    ).config


def _prompt_settings(options: argparse.Namespace, *, has_template: bool) -> DataConfig:
    """How prompts are written: as in the run that saved the model, overridden by the flags."""
    run = settings_of_run(options.model)
    values: dict[str, Any] = {"prompt_format": "chat" if has_template else "text"}
    if run is not None:
        values |= run.prompts
        shown = {key: value for key, value in values.items() if value}
        print(f"note: prompts as in {run.file}: {shown}", file=sys.stderr)
    given = {key: getattr(options, key) for key in ("prompt_format", "system_prompt", "chat_template_kwargs")}
    values |= {key: value for key, value in given.items() if value is not None}
    if values["prompt_format"] == "text" and given["system_prompt"]:
        raise UsageError("--system needs a chat template and --prompt-format chat")
    return resolve({"data": values}).config.data


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
    add("--system", dest="system_prompt", help="system message (default: the run's)")
    add("--prompt-format", choices=("text", "chat"), help="text continues each line without a template")
    help_ = "arguments of the chat template, as JSON (default: the run's)"
    add("--chat-template-kwargs", type=_json, metavar="JSON", help=help_)
    add("--chat-template-path", metavar="PATH", help="Jinja file or tokenizer whose chat template is used")
    add("--temperature", type=float, default=0.7, help="sampling temperature; 0 takes the most likely token")
    add("--top-p", type=float, help="nucleus sampling")
    add("--top-k", type=int, help="sample among the k most likely tokens")
    help_ = "sample among the tokens with this fraction of the most likely token's probability"
    add("--min-p", type=float, help=help_)
    add("--repetition-penalty", type=float, help="factor that lowers the logits of earlier tokens; 1 is none")
    help_ = "texts that end a completion and belong to it (default: the run's)"
    add("--stop-strings", nargs="+", metavar="TEXT", help=help_)
    help_ = "tokens that end a completion, in addition to the model's end tokens"
    add("--stop-tokens", nargs="+", default=[], metavar="TOKEN", help=help_)
    add("--max-new-tokens", type=int, default=512, help="maximum number of tokens per completion")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser.parse_args(arguments)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
