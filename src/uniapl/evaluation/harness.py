"""Benchmarks of lm-eval on a model that is already loaded, to see what else training changed."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.errors import UniAPLError, UsageError


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """lm-eval's task manager, after a check that all tasks exist.

    Args:
        tasks: Names of lm-eval's tasks or groups, e.g. gsm8k.
        include_path: A directory with further task files.

    Raises:
        UsageError: lm-eval is not installed, or a task does not exist.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed: pip install 'uniapl[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"lm-eval has no task {', '.join(map(repr, unknown))}")
    return manager


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as reported by lm-eval (standard errors included).

    Args:
        manager: The result of :func:`find_tasks`.

    Raises:
        UniAPLError: lm-eval cannot load a task's data, or fails.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    simple_evaluate: Any = lm_eval.simple_evaluate
    wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            apply_chat_template=tokenizer.chat_template is not None,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:  # data sets may be unavailable, and tasks run their own code
        raise UniAPLError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for task, metrics in found["results"].items()
    }
