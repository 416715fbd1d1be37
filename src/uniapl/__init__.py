"""UniAPL: one-stage post-training of language models.

Every gradient step learns from expert demonstrations (SFT), from scored rollouts (GRPO), and from a
discriminator that tells the two apart. `uniapl.train` is the whole thing in one call; `uniapl.functional` is
the mathematics alone. Importing this package imports nothing heavy: names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniapl.config import Config
    from uniapl.errors import HealthStop, UniAPLError, UsageError
    from uniapl.rewards import RewardFunction, register
    from uniapl.training.api import RunResult, train
    from uniapl.types import Example, MicroBatch, Rollout, RolloutGroup

_HOME = {
    "Config": "uniapl.config",
    "Example": "uniapl.types",
    "HealthStop": "uniapl.errors",
    "MicroBatch": "uniapl.types",
    "RewardFunction": "uniapl.rewards",
    "Rollout": "uniapl.types",
    "RolloutGroup": "uniapl.types",
    "RunResult": "uniapl.training.api",
    "UniAPLError": "uniapl.errors",
    "UsageError": "uniapl.errors",
    "register": "uniapl.rewards",
    "train": "uniapl.training.api",
}

__all__ = [
    "Config",
    "Example",
    "HealthStop",
    "MicroBatch",
    "RewardFunction",
    "Rollout",
    "RolloutGroup",
    "RunResult",
    "UniAPLError",
    "UsageError",
    "register",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("uniapl")
    if name not in _HOME:
        raise AttributeError(f"module 'uniapl' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
