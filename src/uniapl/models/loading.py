"""Loading what transformers knows from a directory or the Hub, with one clear error for all that fails."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.models.lora import add_adapter, base_of, is_adapter, load_adapter, merge_adapter


def from_pretrained(load: Callable[..., Any], what: str, name: str, **arguments: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, returns.

    Args:
        what: What it is for, as the error calls it.
        name: A directory or a Hub id.

    Raises:
        UsageError: It cannot be loaded; whatever the reason, its name and what was said of it.
    """
    # A Hub id has one slash at most; asking the Hub for a path would only cost the user minutes of retries.
    exists = os.path.exists(name)
    if not exists and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UsageError(f"cannot load the {what} '{name}': there is no such directory")
    try:
        return load(name, **arguments)
    except Exception as error:  # transformers and the Hub client raise many kinds
        hint = "" if exists else " (there is no such directory here)"
        if os.path.isdir(Path(name) / "final"):
            hint = f" (it is the directory of a run: did you mean {Path(name) / 'final'}?)"
        raise UsageError(f"cannot load the {what} '{name}'{hint}: {error}") from error


def refuse_adapter(what: str, name: str, revision: str | None = None) -> None:
    """Refuse an adapter where a whole model is needed: transformers would give its base, all of it frozen.

    Raises:
        UsageError: An adapter is what lies in the directory or on the Hub.
    """
    if from_pretrained(find_adapter_config_file, what, name, revision=revision) is None:
        return
    remedy = f"merge it by `uniapl export {name} -o DIRECTORY` and give that directory"
    if not is_adapter(name):
        remedy = "download it from the Hub and give its directory"
    raise UsageError(f"cannot load the {what} '{name}': it is an adapter: {remedy}")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, padding on the right with its pad token or else its end token.

    An adapter that comes without one, as PEFT saves it, has its base's.
    """
    name = config.model_name_or_path
    if name is not None and is_adapter(name) and not any(Path(name).glob("tokenizer*")):
        config = base_of(config)
    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, "tokenizer", config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig) -> Any:
    """The architecture's description, without weights; an adapter has its base's."""
    return _from_pretrained(AutoConfig.from_pretrained, _what(config), base_of(config))


def load_model(config: ModelConfig, path: str | Path | None = None) -> PreTrainedModel:
    """The causal language model in fp32 (training computes in bf16 under autocast where that is on).

    An adapter's directory gives its base with the adapter merged.
    """
    if path is not None:
        config = config.model_copy(update={"model_name_or_path": str(path), "model_revision": None})
    model, name = _load_base(config), config.model_name_or_path
    return merge_adapter(model, name) if name is not None and is_adapter(name) else model


def load_policy(config: ModelConfig, path: Path | None = None, *, seed: int) -> PreTrainedModel:
    """What is trained, with the weights in `path`: the whole model, or with `lora_r` a base and its adapter.

    Args:
        path: Weights of a stage or a checkpoint; None: the run's own start.
        seed: Of a fresh adapter.
    """
    if config.lora_r is None:
        return load_model(config, path)
    model = _load_base(config)
    add_adapter(model, config, seed=seed)
    start = path or config.model_name_or_path
    if start is not None and is_adapter(start):
        load_adapter(model, start)
    return model


def _load_base(config: ModelConfig) -> PreTrainedModel:
    optional = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return _from_pretrained(
        AutoModelForCausalLM.from_pretrained,
        _what(config),
        base_of(config),
        dtype=torch.float32,
        use_safetensors=True,
        **optional,
    )


def _what(config: ModelConfig) -> str:
    """What is loaded, as an error calls it."""
    name = config.model_name_or_path
    return f"base of the adapter '{name}':" if is_adapter(name) else "model"


def _from_pretrained(load: Callable[..., Any], what: str, config: ModelConfig, **arguments: Any) -> Any:
    name = config.model_name_or_path
    if name is None:
        raise UsageError("no model: set model.model_name_or_path to a directory or a Hub id")
    if not os.path.exists(name):
        refuse_adapter(what, name, config.model_revision)
    return from_pretrained(
        load,
        what,
        name,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        **arguments,
    )


def load_stop_ids(
    config: ModelConfig, model_config: Any, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The end tokens of the tokenizer, of the model's configuration and of its generation settings."""
    config = base_of(config)
    name = str(config.model_name_or_path)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=config.model_revision or "main")
        configured = generation.eos_token_id
    except Exception as error:  # transformers raises many kinds on settings of a wrong form
        # A model need not come with generation settings; those that it has may hold end tokens.
        if not isinstance(error, OSError) or os.path.exists(Path(name) / "generation_config.json"):
            raise UsageError(
                f"cannot load the generation settings of the model '{name}': {error}; mend or delete its "
                "generation_config.json"
            ) from error
        configured = None
    found: list[Any] = [tokenizer.eos_token_id]
    for ids in (configured, getattr(model_config.get_text_config(), "eos_token_id", None)):
        found += ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in found if isinstance(token, int))


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has ids the model does not know."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}: they do not belong together"
        )
