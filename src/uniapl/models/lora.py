"""LoRA for the policy: low-rank changes of frozen weights, as PEFT makes, reads and merges them."""

import contextlib
import copy
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.types import derive_seed

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT's files write before each name."""
COMPARED = ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora")
"""Settings that two adapters share if one's tensors mean the same in the other; beside names and shapes."""
TIED = "the model's embedding and head are one weight, so that a merged adapter would change both"
"""Why neither of the two may have an adapter of its own."""


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("LoRA adapters need peft: pip install 'uniapl[peft]'")


def is_adapter(path: str | Path | None) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    # Not Path.is_file, which raises on a name that no file can have.
    return path is not None and os.path.isfile(Path(path) / SETTINGS)


def base_of(config: ModelConfig) -> ModelConfig:
    """The model under an adapter's directory, by its name; any other model as it is.

    Raises:
        UsageError: The adapter does not say whose it is.
    """
    if not is_adapter(config.model_name_or_path):
        return config
    settings = _settings(str(config.model_name_or_path))
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UsageError(f"the adapter '{config.model_name_or_path}' names no base model in its {SETTINGS}")
    if name.count("/") > 1 and not os.path.exists(name):
        raise UsageError(
            f"the adapter '{config.model_name_or_path}' is one of '{name}', and there is no such directory, "
            f"seen from here: write where that model lies to base_model_name_or_path in its {SETTINGS}"
        )
    revision = settings.get("revision")
    return config.model_copy(update={"model_name_or_path": name, "model_revision": revision})


def add_adapter(model: PreTrainedModel, config: ModelConfig, *, seed: int) -> None:
    """Freeze a model and give it an adapter that changes nothing yet, drawn from the seed.

    Raises:
        UsageError: peft is not installed, or a module that is named is not there or cannot have an adapter.
    """
    require_peft()
    from peft import LoraConfig

    assert config.lora_r is not None
    targets = config.lora_target_modules
    known = [f".{name}" for name, _ in model.named_modules() if name]
    missing = [end for end in targets if not any(name.endswith(f".{end}") for name in known)]
    # PEFT would pass over such a name, if another one is there.
    if missing and targets != ("all-linear",):
        raise UsageError(
            f"model.lora_target_modules: no adapter for {', '.join(missing)}: {type(model).__name__} has no "
            "such module; give all-linear, or the ends of its layers' names: several are [q_proj, v_proj] in "
            "a recipe, q_proj v_proj on the command line"
        )
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        # Dropout in the ratio's two log-probabilities would make the ratio noise.
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
        revision=base_of(config).model_revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            model.add_adapter(settings)
        except ValueError as error:
            named = ", ".join(targets)
            raise UsageError(f"model.lora_target_modules: no adapter for {named}: {error!s:.300}") from error
    if adapted := _adapted_tied(model):
        raise UsageError(f"model.lora_target_modules: no adapter for {adapted}: {TIED}; leave it out")
    # A set, whose order would be another in each process, and so the file's.
    settings.target_modules = sorted(settings.target_modules or ())


def save_weights(model: PreTrainedModel, directory: Path) -> None:
    """What has been trained: a model's adapter as PEFT loads it, or a whole model as transformers does."""
    settings: Any = getattr(model, "peft_config", None)
    if settings is None:
        model.save_pretrained(directory)
        return
    tensors = {key: model.get_parameter(name).detach() for key, name in _names(model).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / WEIGHTS)
    settings["default"].save_pretrained(directory)


def load_adapter(model: PreTrainedModel, path: str | Path) -> None:
    """Give a model's adapter the weights of one in a directory. Raises as :func:`read_adapter`."""
    with torch.no_grad():
        for name, tensor in read_adapter(model, path).items():
            model.get_parameter(name).copy_(tensor)


def read_adapter(model: PreTrainedModel, path: str | Path) -> dict[str, Tensor]:
    """The weights of an adapter in a directory, by the names that the model's own adapter gives them.

    Raises:
        UsageError: It is another kind of adapter than the model's.
    """
    from peft import LoraConfig

    adapters: Any = model.peft_config
    ours = adapters["default"].to_dict()
    # An older PEFT did not write the settings that it did not know.
    theirs = LoraConfig().to_dict() | _settings(path)
    names, tensors = _names(model), _tensors(path)
    different = [f"{k} {theirs[k]} instead of {ours[k]}" for k in COMPARED if theirs[k] != ours[k]]
    if not different and tensors.keys() != names.keys():
        different = [f"{len(tensors)} matrices instead of {len(names)}, of other modules"]
    for key, tensor in tensors.items() if not different else ():
        expected = model.get_parameter(names[key]).shape
        if tensor.shape != expected:
            said = f"{key} is {list(tensor.shape)} instead of {list(expected)}"
            different = [f"of another base or other ranks: {said}"]
    if different:
        raise UsageError(
            f"the adapter '{path}' is not as the recipe's model.lora_r, lora_alpha and lora_target_modules "
            f"say ({'; '.join(different)}): change them, or merge it by `uniapl export {path} -o "
            "DIRECTORY` and start from there"
        )
    return {names[key]: tensor for key, tensor in tensors.items()}


def merge_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model with the adapter in a directory added to its weights.

    Raises:
        UsageError: peft is not installed, or the adapter is not this model's.
    """
    require_peft()
    from peft import PeftModel

    _tensors(path)
    try:
        with warnings.catch_warnings():
            # What peft asks of transformers in an outdated way is nothing that a user could mend.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = PeftModel.from_pretrained(model, str(path))
        if tied := _adapted_tied(adapted.get_base_model()):
            raise ValueError(f"it changes {tied}, and {TIED}; train one that does not")
        # peft had frozen it; a run may start from it.
        return adapted.merge_and_unload().requires_grad_(True)
    except Exception as error:  # peft and torch raise many kinds on an adapter of another model
        raise UsageError(f"cannot load the adapter '{path}': {error!s:.300}") from error


def merge_in_place(trunk: nn.Module) -> None:
    """Add each adapter inside a module to the weights that it changes, and take it away; train them all."""
    for name, layer in _adapted_layers(trunk).items():
        layer.merge()
        trunk.set_submodule(name, layer.get_base_layer())
    trunk.requires_grad_(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A model as it is, or with its adapter added to the weights, a copy on the CPU: what others load."""
    whole: Any = model
    if getattr(model, "peft_config", None) is not None:
        # The device that trains has no room for another model.
        weights = {
            id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        whole = copy.deepcopy(model, weights)
        merge_in_place(whole)
        del whole.peft_config
        # By this transformers knows that it is to save an adapter alone.
        whole._hf_peft_config_loaded = False
    return whole


@contextlib.contextmanager
def without_adapter(trunk: nn.Module) -> Iterator[None]:
    """The base model: adapters inside are passed over; a module without any is as it was."""
    layers = _adapted_layers(trunk).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def linear_layers(trunk: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a base model by their names in it, whether or not they have adapters."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in trunk.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }


def _adapted_layers(module: nn.Module) -> dict[str, Any]:
    """PEFT's layers, known by what they do: whoever uses no adapter need not have PEFT."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_base_layer")}


def _adapted_tied(model: PreTrainedModel) -> str | None:
    """The name of an embedding or a head that has an adapter, where the two are one weight."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return None
    return next((name for name, layer in _adapted_layers(model).items() if layer in ends), None)


def _names(model: PreTrainedModel) -> dict[str, str]:
    """Name in PEFT's file -> parameter, of everything that is trained; "default" is PEFT's adapter name."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {PREFIX + re.sub(r"(\.lora_\w+)\.default", r"\1", name): name for name in trained}


def _settings(path: str | Path) -> dict[str, Any]:
    file = Path(path) / SETTINGS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the adapter's settings '{file}': {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"cannot read the adapter's settings '{file}': not a mapping")
    return content


def _tensors(path: str | Path) -> dict[str, Tensor]:
    file = Path(path) / WEIGHTS
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own
        raise UsageError(f"cannot read the adapter's weights '{file}': {error}") from error
