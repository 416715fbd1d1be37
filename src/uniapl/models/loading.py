"""Load models and tokenizers from a directory or the Hub."""

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, peft_utils

from uniapl.config import ModelConfig
from uniapl.data.tokenization import ordinary_tokens
from uniapl.errors import UsageError
from uniapl.models.generation import read_generation_config, set_chat_template, token_ids
from uniapl.models.lora import (
    add_adapter,
    attach_adapter,
    base_of_adapter,
    is_adapter,
    merge_adapter,
    read_adapter,
    require_peft,
)
from uniapl.models.tensors import refuse_other_tensors
from uniapl.untyped import decode, is_list


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a causal language model is loaded from: a complete model, or a base model and a LoRA adapter."""

    base: str
    """Directory or Hub id of the complete model, or of the adapter's base model."""
    adapter: Path | None = None
    """Directory of the adapter; None for a complete model."""
    revision: str | None = None
    """Branch, tag or commit of `base` on the Hub."""
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    chat_template_path: str | None = None
    """Template that replaces the tokenizer's; see :class:`ModelConfig`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, in addition to those in the model's files."""

    @staticmethod
    def resolve(config: ModelConfig) -> "ModelSource":
        """Find the model that the configuration names. The settings of an adapter name its base model.

        Raises:
            UsageError: No model is named, the base model is not found, or the Hub id is an adapter's.
        """
        name, revision, adapter = config.model_name_or_path, config.model_revision, None
        if name is None:
            raise UsageError("no model: set model.model_name_or_path to a directory or a Hub id")
        if is_adapter(name):
            adapter = Path(name)
            name, revision = base_of_adapter(adapter)
        source = ModelSource(
            base=name,
            adapter=adapter,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
            chat_template_path=config.chat_template_path,
            stop_tokens=config.stop_tokens,
        )
        refuse_adapter(source.what, name, revision)
        return source

    @property
    def what(self) -> str:
        """The name of `base` in error messages."""
        return "model" if self.adapter is None else f"base of the adapter '{self.adapter}':"

    def with_weights(self, directory: Path | None) -> "ModelSource":
        """The same model with the weights that a run saved in `directory`; None leaves it unchanged."""
        if directory is None:
            return self
        if is_adapter(directory):
            return replace(self, adapter=directory)
        return replace(self, base=str(directory), adapter=None, revision=None)


def from_pretrained(load: Any, what: str, name: str, **arguments: Any) -> Any:
    """Call the `from_pretrained` of a class of transformers, and report each of its errors as a UsageError.

    Args:
        load: The class, or a function that takes the same arguments.
        what: The name of the object in the error message.
        name: A directory or a Hub id.
    """
    # A Hub id has at most one slash. Asking the Hub for a path would take minutes of retries.
    exists = os.path.exists(name)
    if not exists and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UsageError(f"cannot load the {what} '{name}': directory not found")
    if os.path.isfile(name):
        raise UsageError(f"cannot load the {what} '{name}': it is a file; name a model's directory or Hub id")
    try:
        return getattr(load, "from_pretrained", load)(name, **arguments)
    except Exception as error:  # transformers and the Hub client raise many types
        if os.path.isdir(final := Path(name) / "final"):
            raise UsageError(
                f"cannot load the {what} '{name}': it is a run directory; did you mean {final}?"
            ) from error
        hint = "" if exists else " (not a local directory)"
        if exists and not any(Path(name).glob("*.safetensors")) and any(Path(name).glob("*.bin")):
            raise UsageError(
                f"cannot load the {what} '{name}': its weights are in .bin files, which can run code when "
                "loaded. If you trust them, convert them to safetensors, for example by from_pretrained "
                "and save_pretrained of transformers"
            ) from error
        raise UsageError(f"cannot load the {what} '{name}'{hint}: {error}") from error


def load_weights(
    family: Any, what: str, name: str, *, new_head: bool = False, headers_only: bool = False, **arguments: Any
) -> Any:
    """Load a model in fp32, and require that every tensor comes from its files.

    Args:
        family: A class of transformers such as AutoModelForCausalLM.
        what: The name of the model in error messages.
        name: A directory or a Hub id.
        new_head: Whether the tensors outside the trunk may be new.
        headers_only: Read only the names and shapes of the tensors. The result has no data; use it to check.
        arguments: Further arguments of `from_pretrained`.

    Raises:
        UsageError: The files cannot be read, or their tensors are not the model's.
    """
    if headers_only:
        arguments["device_map"] = "meta"
    model, info = from_pretrained(
        family,
        what,
        name,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        # They are refused below, with their names.
        ignore_mismatched_sizes=True,
        **arguments,
    )
    refuse_other_tensors(model, info, f"cannot load the {what} '{name}'", new_head=new_head)
    return model


def refuse_adapter(what: str, name: str, revision: str | None = None) -> None:
    """Require a complete model: from an adapter, transformers would load the base model and freeze it.

    Raises:
        UsageError: The directory or the Hub repository holds an adapter.
    """
    find = cast("Any", peft_utils).find_adapter_config_file
    if from_pretrained(find, what, name, revision=revision) is None:
        return
    remedy = f"merge it with `uniapl export {name} -o DIRECTORY` and use that directory"
    if not is_adapter(name):
        remedy = "download it from the Hub and use its directory"
    raise UsageError(f"cannot load the {what} '{name}': it is an adapter; {remedy}")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer, as it will be saved: unchanged but for the chat template of the recipe.

    An adapter without a tokenizer, as PEFT saves it, uses that of its base model.
    """
    name = source.base
    if source.adapter is not None and any(source.adapter.glob("tokenizer*")):
        name = str(source.adapter)
    tokenizer = _load(AutoTokenizer, "tokenizer", replace(source, base=name))
    if source.chat_template_path is not None:

        def load(path: str) -> PreTrainedTokenizerBase:
            other = replace(source, base=path, revision=None)
            return _load(AutoTokenizer, "tokenizer of model.chat_template_path", other)

        set_chat_template(tokenizer, source.chat_template_path, load)
    return tokenizer


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads rows of a batch: the pad token, or the end token of a tokenizer without one.

    Masks depend on lengths, so that no result depends on this token.

    Raises:
        UsageError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UsageError("the tokenizer has neither a pad token nor an end token: set eos_token in its files")


def load_model_config(source: ModelSource) -> Any:
    """The configuration of the base model, without weights."""
    return _load(AutoConfig, source.what, source)


def load_model(source: ModelSource) -> PreTrainedModel:
    """The complete model in fp32, with its adapter merged. Training may compute in bf16 under autocast."""
    model: Any = _load_base(source)
    if source.adapter is None:
        return model
    if (source.adapter / "generation_config.json").exists():
        model.generation_config = read_generation_config(str(source.adapter))
    return merge_adapter(model, source.adapter)


def put_on_device(model: Any) -> None:
    """Move the model to the accelerator, in bf16 if supported. Apple's GPUs lack the sampler's float64."""
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "mps":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        model.to(device, dtype=torch.bfloat16 if bf16 else torch.float32)


def load_policy(source: ModelSource, config: ModelConfig, *, seed: int) -> PreTrainedModel:
    """The model to train: the complete model, or with `lora_r` the frozen base model and its adapter.

    Args:
        source: The weights to start from.
        config: The shape of the adapter.
        seed: Seed of a new adapter's initial weights.
    """
    if config.lora_r is None:
        return load_model(source)
    model = _load_base(source)
    add_adapter(model, config, revision=source.revision, seed=seed)
    if source.adapter is not None:
        model.load_state_dict(read_adapter(model, source.adapter), strict=False)
    return model


def has_local_weights(name: str, revision: str | None = None) -> bool:
    """Whether a model's weights can be read without a download: from a directory or the Hub's cache."""
    if os.path.exists(name):
        return True

    def cached(file: str) -> str | None:
        found = try_to_load_from_cache(name, file, revision=revision)
        return found if isinstance(found, str) else None

    index = cached(SAFE_WEIGHTS_INDEX_NAME)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return all(map(cached, files))


def check_policy(source: ModelSource, config: ModelConfig) -> bool:
    """Check that :func:`load_policy` finds its tensors, from the headers of the weight files alone.

    Returns:
        Whether the weights were checked; they are not downloaded for it.

    Raises:
        UsageError: A tensor is missing, or has another name or shape.
    """
    if not has_local_weights(source.base, source.revision):
        return False
    model = _load_base(source, headers_only=True)
    if source.adapter is None:
        return True
    if config.lora_r is None:
        require_peft()
        attach_adapter(model, source.adapter)
    else:
        add_adapter(model, config, seed=0)
        read_adapter(model, source.adapter)
    return True


def _known(ids: Any) -> list[int]:
    return [token for token in (ids if is_list(ids) else [ids]) if isinstance(token, int)]


def load_stop_ids(
    source: ModelSource, model_config: Any, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The end tokens of the tokenizer, of the model's configuration, of its generation configuration and of
    `model.stop_tokens`.

    Raises:
        UsageError: The generation configuration is invalid, a stop token is not in the vocabulary, or an end
            token of the model's configuration is ordinary text, like the class's default in a file without
            `eos_token_id`.
    """
    names = [(source.base, source.revision), *([(str(source.adapter), None)] if source.adapter else [])]
    found: list[Any] = [read_generation_config(*name) for name in names]
    configured = [token for one in found if one is not None for token in _known(one.eos_token_id)]
    given = token_ids(source.stop_tokens, tokenizer)
    of_model = _known(getattr(model_config.get_text_config(), "eos_token_id", None))
    if ordinary := ordinary_tokens(of_model, tokenizer):
        tokens = ", ".join(f"{token} ({decode([token], tokenizer)!r})" for token in ordinary)
        raise UsageError(
            f"the configuration of the model '{source.base}' has the end token {tokens}, which is ordinary "
            "text, so every completion would end there; set eos_token_id in its config.json, which otherwise "
            f"has its class's default, for example to the tokenizer's {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r})"
        )
    return frozenset(_known(tokenizer.eos_token_id) + configured + given + of_model)


def save_stop_ids(stop_ids: Iterable[int], model: PreTrainedModel, directory: Path) -> None:
    """Write the end tokens into the generation_config.json of a saved model or adapter.

    transformers' `generate`, vLLM, and UniAPL's other commands stop there too.
    """
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = sorted(stop_ids)
    cast("Any", config).save_pretrained(directory)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with token ids beyond the model's embedding matrix."""
    embeddings: Any = model.get_input_embeddings()
    check_vocabulary_size(embeddings.weight.shape[0], tokenizer)


def check_vocabulary_size(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than an embedding matrix has rows."""
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has only {rows}; use the tokenizer "
            "that belongs to the model"
        )


def _load_base(source: ModelSource, *, headers_only: bool = False) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
    }
    if source.attn_implementation:
        arguments["attn_implementation"] = source.attn_implementation
    model = load_weights(
        AutoModelForCausalLM, source.what, source.base, headers_only=headers_only, **arguments
    )
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not table.weight:
        # transformers ties two different tensors of a file only in the configuration, which is saved.
        model.config.tie_word_embeddings = False
    return model


def _load(family: Any, what: str, source: ModelSource) -> Any:
    arguments = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    return from_pretrained(family, what, source.base, **arguments)
