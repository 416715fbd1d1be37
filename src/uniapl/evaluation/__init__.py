"""Evaluation of a model on suites of prompts, with baselines that use no model and confidence intervals."""

from uniapl.evaluation.run import evaluate_suite
from uniapl.evaluation.suites import Suite, load_suites

__all__ = ["Suite", "evaluate_suite", "load_suites"]
