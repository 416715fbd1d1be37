"""Compare the tensors of a model with those of the files that it was loaded from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uniapl.errors import UsageError

SHOWN = 4
"""Tensors that an error message names."""


def refuse_other_tensors(model: Any, info: Mapping[str, Any], where: str, *, new_head: bool = False) -> None:
    """Refuse a model with tensors that are not in its files, or whose files hold more of its layers.

    transformers draws missing tensors at random and only logs them. It removes tied tensors from the list.

    Args:
        model: The loaded model.
        info: The loading information of `from_pretrained` (`output_loading_info`).
        where: The start of the error message.
        new_head: Whether the tensors outside the trunk may be new.

    Raises:
        UsageError: It names the tensors.
    """
    trunk = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(trunk) or not new_head)
    if missing:
        unexpected = sorted(info["unexpected_keys"])
        raise UsageError(
            f"{where}: {_listed(missing)} missing from its files, and would be random. "
            f"{_remedy(missing, unexpected)}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{name} {list(theirs)} instead of {list(ours)}" for name, theirs, ours in mismatched]
        raise UsageError(
            f"{where}: other shapes than in its config.json ({_some(shapes)}): use the config.json that "
            "belongs to the weights"
        )
    if inside := sorted(key for key in info["unexpected_keys"] if _is_inside(model, key)):
        raise UsageError(
            f"{where}: its files hold tensors of its layers that its config.json does not have "
            f"({_some(inside)}), and would be left out of the computation: use the config.json that belongs "
            "to the weights"
        )


def _remedy(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What to do about missing tensors, from the names in the files that the model does not have."""
    if not unexpected:
        return (
            "Save the complete model again; if these tensors are tied to others, set tie_word_embeddings to "
            "true in its config.json"
        )
    prefixes = {name[: -len(key)] for name in unexpected for key in missing if name.endswith(f".{key}")}
    prefix = min(prefixes, key=len, default="")
    if prefix and all(name.startswith(prefix) for name in unexpected):
        return f"The names in the files begin with '{prefix}': save the model again without this prefix"
    return f"The files hold other names ({_some(unexpected)}): rename the tensors, or use another model class"


def _is_inside(model: Any, key: str) -> bool:
    """Whether a tensor is a weight or bias in a part of the trunk, such as a layer, or in the head.

    Other tensors inside a layer are buffers that older versions of transformers saved, such as masks.
    """
    trunk = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for name in (key, trunk + key, key.removeprefix(trunk)):
        path, _, last = name.rpartition(".")
        parent = modules.get(path)
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if modules[path] is model or modules[path] is model.base_model:
            continue
        if last in ("weight", "bias") if parent is None else "weight" in parent._parameters:
            return True
    return False


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} ({_some(names)})"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
