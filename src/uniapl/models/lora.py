"""LoRA adapters: create, save, read and merge them in PEFT's format."""

import contextlib
import copy
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.types import derive_seed
from uniapl.untyped import is_dict

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
COMPARED_SETTINGS = ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora")
"""Settings that must be equal for two adapters' tensors to have the same meaning."""
TIED = "the model's embedding and head are one weight, so a merged adapter would change both"


def require_peft() -> None:
    """Raise a UsageError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("LoRA adapters need peft: pip install 'uniapl[peft]'")


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter rather than a complete model."""
    # Path.is_file raises an error if the name is too long for a file name.
    return os.path.isfile(Path(path) / SETTINGS)


def base_of_adapter(path: Path) -> tuple[str, str | None]:
    """Name and revision of the base model in the settings of an adapter.

    Raises:
        UsageError: The settings name no base model, or a directory that does not exist.
    """
    settings = _settings(path)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UsageError(f"the adapter '{path}' names no base model in its {SETTINGS}")
    if name.count("/") > 1 and not os.path.exists(name):
        raise UsageError(
            f"the base model '{name}' of the adapter '{path}' does not exist; set base_model_name_or_path in "
            f"its {SETTINGS} to the model's directory"
        )
    return name, settings.get("revision")


def add_adapter(
    model: PreTrainedModel, config: ModelConfig, *, seed: int, revision: str | None = None
) -> None:
    """Freeze a model and add a new adapter with B = 0, which does not change the output yet.

    Args:
        config: Rank, alpha and target modules of the adapter.
        seed: Seed of the initial A.
        revision: Revision of the base model, saved with the adapter.

    Raises:
        UsageError: peft is not installed, or a target module does not exist or cannot have an adapter.
    """
    require_peft()
    from peft import LoraConfig

    assert config.lora_r is not None
    targets = config.lora_target_modules
    modules = [f".{name}" for name, _ in _modules(model) if name]
    missing = [end for end in targets if not any(name.endswith(f".{end}") for name in modules)]
    # PEFT ignores a missing name if another name exists.
    if missing and targets != ("all-linear",):
        raise UsageError(
            f"model.lora_target_modules: {type(model).__name__} has no module "
            f"{', '.join(map(repr, missing))}; use all-linear or the last parts of its layers' names, for "
            "example [q_proj, v_proj] in a recipe, q_proj v_proj on the command line"
        )
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        # The probability ratio compares two forward passes, which dropout would make random.
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
        revision=revision,
    )
    random = cast("Any", torch.random)
    with random.fork_rng(devices=[]):
        random.manual_seed(derive_seed(seed, "adapter"))
        try:
            cast("Any", model).add_adapter(settings)
        except ValueError as error:
            raise UsageError(f"model.lora_target_modules: {', '.join(targets)}: {error!s:.300}") from error
    if adapted := _adapted_tied(model):
        raise UsageError(f"model.lora_target_modules: remove {adapted}: {TIED}")
    # The order of a set differs between processes, and so would the saved file.
    settings.target_modules = sorted(settings.target_modules or ())


def save_weights(model: PreTrainedModel, directory: Path) -> None:
    """Save the trained weights: an adapter in PEFT's format, or a complete model."""
    settings: Any = getattr(model, "peft_config", None)
    if settings is None:
        cast("Any", model).save_pretrained(directory)
        return
    tensors = {key: model.get_parameter(name).detach() for key, name in _parameter_names(model).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / WEIGHTS)
    settings["default"].save_pretrained(directory)


def read_adapter(model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """The weights in an adapter's directory, by the names of the model's own adapter parameters.

    Raises:
        UsageError: The files cannot be read, or the two adapters differ in settings, modules or shapes.
    """
    from peft import LoraConfig

    adapters: Any = model.peft_config
    ours = adapters["default"].to_dict()
    # Older versions of PEFT did not write every setting; a missing one has its default value.
    theirs: dict[str, Any] = {**LoraConfig().to_dict(), **_settings(path)}
    names, tensors = _parameter_names(model), _tensors(path)
    shapes = {key: model.get_parameter(name).shape for key, name in names.items()}
    different = [f"{k} {theirs[k]} instead of {ours[k]}" for k in COMPARED_SETTINGS if theirs[k] != ours[k]]
    if not different and tensors.keys() != names.keys():
        example = min(tensors.keys() ^ names.keys())
        different = [f"{len(tensors)} matrices instead of {len(names)}, for other modules ({example})"]
    for key, tensor in tensors.items() if not different else ():
        if tensor.shape != shapes[key]:
            shape = f"{key} is {list(tensor.shape)} instead of {list(shapes[key])}"
            different = [f"another base model or rank: {shape}"]
    if different:
        raise UsageError(
            f"the adapter '{path}' does not match model.lora_r, lora_alpha and lora_target_modules "
            f"({'; '.join(different)}): change these keys, or merge it with `uniapl export {path} -o "
            "DIRECTORY` and train from that directory"
        )
    return {names[key]: tensor for key, tensor in tensors.items()}


def merge_adapter(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Add the adapter in a directory to the weights of a model.

    Raises:
        UsageError: peft is not installed, or the adapter does not fit the model.
    """
    require_peft()
    # peft froze the model, but a run may train it.
    return attach_adapter(model, path).merge_and_unload().requires_grad_(True)


def attach_adapter(model: PreTrainedModel, path: Path) -> Any:
    """The model with the adapter in a directory, as PEFT's model.

    Raises:
        UsageError: The adapter does not fit the model.
    """
    from peft import PeftModel

    _tensors(path)
    try:
        with warnings.catch_warnings():
            # peft calls a deprecated function of transformers, which users cannot change.
            warnings.simplefilter("ignore", FutureWarning)
            # Missing tensors are an error below, and `check` loads into a model without data.
            warnings.filterwarnings("ignore", "Found missing adapter keys|.* to a meta parameter")
            adapted = cast("Any", PeftModel).from_pretrained(model, str(path))
            # Loaded once more, because from_pretrained does not return the names that do not match.
            found = adapted.load_adapter(str(path), "default")
        if tied := _adapted_tied(adapted.get_base_model()):
            raise ValueError(f"it changes {tied}, but {TIED}; train an adapter without it")
        if other := [*found.missing_keys, *found.unexpected_keys]:
            raise ValueError(
                f"{len(found.missing_keys)} of its tensors are missing from the file and "
                f"{len(found.unexpected_keys)} in the file are not its own, for example {other[0]}; use the "
                "file and the base model with which it was trained"
            )
        return adapted
    except Exception as error:  # peft and torch raise many types if the adapter is another model's
        raise UsageError(f"cannot load the adapter '{path}': {error!s:.300}") from error


def merge_in_place(module: nn.Module) -> None:
    """Merge all adapters inside a module into its weights, and make the weights trainable."""
    for name, layer in _adapted_layers(module).items():
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    module.requires_grad_(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or, if it has an adapter, a copy on the CPU with the adapter merged."""
    if getattr(model, "peft_config", None) is None:
        return model
    # The training device has no memory for a second model.
    weights = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    complete: Any = copy.deepcopy(model, weights)
    merge_in_place(complete)
    del complete.peft_config
    # Otherwise transformers would save only an adapter.
    complete._hf_peft_config_loaded = False
    return complete


@contextlib.contextmanager
def without_adapter(module: nn.Module) -> Generator[None]:
    """Disable all adapters inside a module for the duration of the context."""
    layers = _adapted_layers(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a module by name; adapters do not change the names."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in _modules(module)
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(cast("Any", module).named_modules())


def _adapted_layers(module: nn.Module) -> dict[str, Any]:
    """PEFT's layers, recognised by a method so that peft need not be installed."""
    return {name: layer for name, layer in _modules(module) if hasattr(layer, "get_base_layer")}


def _adapted_tied(model: PreTrainedModel) -> str | None:
    """The name of an embedding or head that has an adapter although the two share one weight."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return None
    return next((name for name, layer in _adapted_layers(model).items() if layer in ends), None)


def _parameter_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in PEFT's file -> name of the trained parameter. PEFT's file omits the adapter name "default"."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"base_model.model." + re.sub(r"(\.lora_\w+)\.default", r"\1", name): name for name in trained}


def _settings(path: Path) -> dict[str, Any]:
    content = _read("settings", path / SETTINGS, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if not is_dict(content):
        raise UsageError(f"cannot read the adapter's settings '{path / SETTINGS}': expected a JSON object")
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    return _read("weights", path / WEIGHTS, load_file)


def _read(what: str, file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except Exception as error:  # json and safetensors raise many types
        raise UsageError(f"cannot read the adapter's {what} '{file}': {error}") from error
