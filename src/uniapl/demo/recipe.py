"""The recipes of the demo tasks, used by `uniapl demo` and by every cell of a comparison, and the rewards."""

from typing import Any

MAX_COMPLETION_LENGTH = 48

RECIPE: dict[str, Any] = {
    "method": "uniapl",
    "output_dir": "runs/demo",
    "max_steps": 125,
    "save_steps": 125,
    "logging_steps": 10,
    "rollout": {"num_generations": 8, "max_completion_length": MAX_COMPLETION_LENGTH},
    "rewards": {"functions": ["uniapl.demo.rewards:constraints_satisfied"]},
    "optim": {"learning_rate": 1e-3, "lr_scheduler_type": "linear"},
    # On a CPU, less padding in small micro-batches outweighs more rows per micro-batch.
    "batching": {"prompts_per_step": 12, "demonstrations_per_step": 8, "max_tokens_per_micro_batch": 1024},
}

_MODULE = "uniapl.demo.rewards"
REWARDS: dict[str, dict[str, Any]] = {
    "honest": {"rewards": {"functions": [f"{_MODULE}:constraints_satisfied"]}},
    "gameable": {"rewards": {"functions": [f"{_MODULE}:content_satisfied", f"{_MODULE}:length"]}},
    "keywords": {"rewards": {"functions": [f"{_MODULE}:content_satisfied", f"{_MODULE}:adjectives"]}},
    "phrase": {"rewards": {"functions": [f"{_MODULE}:phrase_or_constraints"]}},
    "preferences": {
        "rewards": {"functions": [f"{_MODULE}:preference_model"]},
        "objective": {"pass_threshold": 0.5},
    },
    "half": {"rewards": {"functions": [f"{_MODULE}:limits_satisfied"]}},
}
"""Changes to the recipe, by the name of the reward."""

TOOLS_RECIPE: dict[str, Any] = {
    **RECIPE,
    "rollout": {
        "num_generations": 8,
        "max_completion_length": 72,
        "tools": ["uniapl.demo.arithmetic:lookup", "uniapl.demo.arithmetic:calculate"],
        "max_tool_calling_iterations": 4,
    },
    "rewards": {"functions": ["uniapl.demo.answers:solved"]},
    "evaluation": {
        "metrics": ["uniapl.demo.answers:solved", "uniapl.demo.answers:answered"],
        "max_completion_length": 72,
        "temperature": 1.0,
    },
}
"""The recipe of the demo task with tools."""
