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
    from uniapl.train.api import RunResult, train
    from uniapl.types import Example, MicroBatch, Rollout, RolloutGroup

_HOME = {
    "Config": "uniapl.config",
    "Example": "uniapl.types",
    "HealthStop": "uniapl.errors",
    "MicroBatch": "uniapl.types",
    "RewardFunction": "uniapl.rewards",
    "Rollout": "uniapl.types",
    "RolloutGroup": "uniapl.types",
    "RunResult": "uniapl.train.api",
    "UniAPLError": "uniapl.errors",
    "UsageError": "uniapl.errors",
    "register": "uniapl.rewards",
    "train": "uniapl.train",
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
    if name not in _HOME:
        raise AttributeError(f"module 'uniapl' has no attribute '{name}'")
    home = import_module(_HOME[name])
    return home if name == "train" else getattr(home, name)
