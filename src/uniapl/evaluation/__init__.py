"""Evaluation: suites of prompts, answered with the trainer's own sampler, scored, with floors and intervals.

suites.py         a name or a file -> prompts and how their answers are scored
scores.py         scores of samples -> means with intervals, pass@k, floors, paired differences
run.py            sample, decode, score: one suite and one model
contamination.py  which prompts of one set stand in another
harness.py        every other benchmark, through lm-eval
command.py        `uniapl evaluate`
"""

from uniapl.evaluation.run import evaluate_suite
from uniapl.evaluation.suites import Suite, load_suites

__all__ = ["Suite", "evaluate_suite", "load_suites"]
