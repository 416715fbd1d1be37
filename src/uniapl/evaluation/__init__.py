"""Evaluation of a model on suites of prompts, with baselines that use no model and confidence intervals."""

from uniapl.evaluation.run import Part, evaluate_suite
from uniapl.evaluation.suites import Suite, load_suites

__all__ = ["Part", "Suite", "evaluate_suite", "load_suites"]
