"""UniAPL: one-stage post-training of language models.

Every gradient step trains on expert demonstrations (SFT), on scored rollouts (GRPO), and against a
discriminator that distinguishes the two. `uniapl.train` runs all of it; `uniapl.functional` holds the
mathematics. Importing this package imports nothing heavy, because every name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniapl.config import Config
    from uniapl.errors import HealthStop, UniAPLError, UsageError
    from uniapl.rewards import RewardFunction, register
    from uniapl.training.api import RunResult, train
    from uniapl.types import Example, MicroBatch, Rollout, RolloutGroup

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

_EXPORTS = {
    "config": ["Config"],
    "errors": ["HealthStop", "UniAPLError", "UsageError"],
    "rewards": ["RewardFunction", "register"],
    "training.api": ["RunResult", "train"],
    "types": ["Example", "MicroBatch", "Rollout", "RolloutGroup"],
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("uniapl")
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(f"uniapl.{module}"), name)
    raise AttributeError(f"module 'uniapl' has no attribute '{name}'")
