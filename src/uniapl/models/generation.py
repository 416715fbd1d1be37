"""What else belongs to a model: its generation_config.json, its end tokens and its chat template."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from uniapl.config import EvaluationConfig, RolloutConfig
from uniapl.data.rendering import ChatTemplate, render_conversation
from uniapl.errors import UsageError
from uniapl.untyped import is_sequence

OTHER_KEYS = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate"),
}
"""Keys of generation_config.json that are used, or do not change a completion."""
WITHOUT_EFFECT: Any = {
    **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0},
    **{"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0},
    **{"num_return_sequences": 1, "early_stopping": False, "remove_invalid_values": False},
}
"""Values of other settings with which they change no completion."""
TEMPLATE_FILES = (".jinja", ".jinja2", ".j2", ".txt")


def read_generation_config(name: str, revision: str | None = None) -> GenerationConfig | None:
    """The generation configuration in a directory or Hub repository; None if there is none.

    Raises:
        UsageError: It is invalid.
    """
    try:
        return cast("Any", GenerationConfig).from_pretrained(name, revision=revision or "main")
    except Exception as error:  # transformers raises many types for an invalid file
        # A model may come without a generation configuration, but an invalid one may hide end tokens.
        if not isinstance(error, OSError) or os.path.exists(Path(name) / "generation_config.json"):
            raise UsageError(
                f"cannot load the generation configuration of the model '{name}': {error}; correct or "
                "delete its generation_config.json"
            ) from error
        return None


def unused_generation_settings(
    name: str, revision: str | None, used: Sequence[RolloutConfig | EvaluationConfig]
) -> list[str]:
    """Notes about settings in generation_config.json that completions are not sampled with.

    Only the end tokens of that file are used: the recipe says how a run samples.

    Args:
        name: Directory or Hub id of the model.
        revision: Branch, tag or commit on the Hub.
        used: The sections that completions are sampled with. A setting that has the same value in all of them
            is not reported.
    """
    config = read_generation_config(name, revision)
    given = {} if config is None else config.to_diff_dict()
    sections = [WITHOUT_EFFECT | _as_generation_config(section) for section in used]
    ignored = {
        key: value
        for key, value in given.items()
        if key not in OTHER_KEYS and any(section.get(key) != _listed(value) for section in sections)
    }
    if not ignored:
        return []
    text = ", ".join(f"{key}: {value}" for key, value in sorted(ignored.items()))
    return [
        f"not used from the model's generation_config.json: {text}; the recipe and the flags set how "
        "completions are sampled"
    ]


def _as_generation_config(section: RolloutConfig | EvaluationConfig) -> dict[str, Any]:
    """A section's settings under the names of generation_config.json."""
    values = section.model_dump()
    if isinstance(section, EvaluationConfig):
        values["temperature"] = section.sampling_temperature
    values |= {"do_sample": values["temperature"] > 0, "max_new_tokens": section.max_completion_length}
    return {key: _listed(value) for key, value in values.items()}


def _listed(value: Any) -> Any:
    """Texts as a list: stop_strings may be one text."""
    if isinstance(value, str):
        return [value]
    return [*value] if is_sequence(value) else value


def token_ids(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `model.stop_tokens`.

    Raises:
        UsageError: One is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise UsageError(
            f"model.stop_tokens: {unknown[0]!r} is not a token of the tokenizer; for a text of several "
            "tokens use rollout.stop_strings"
        )
    return [vocabulary[token] for token in tokens]


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, path: str, load: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    """Give the tokenizer the template of `model.chat_template_path`, with which it is also saved.

    Args:
        tokenizer: The model's.
        path: A Jinja file, or a directory or Hub id of another tokenizer.
        load: Loads that tokenizer.

    Raises:
        UsageError: There is no template, or it does not render a question and its answer.
    """
    if os.path.isfile(path):
        try:
            template: Any = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"model.chat_template_path '{path}' cannot be read: {error}") from error
    elif path.endswith(TEMPLATE_FILES):
        raise UsageError(f"model.chat_template_path '{path}': file not found")
    else:
        template = cast("Any", load(path)).chat_template
    if not template:
        raise UsageError(f"model.chat_template_path '{path}' has no chat template")
    tokenizer.chat_template = template
    question, answer = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}
    try:
        render_conversation([question], [answer], [], ChatTemplate(tokenizer=tokenizer, arguments={}))
    except UsageError as error:
        raise UsageError(f"model.chat_template_path '{path}': {error}") from error
