"""Everything that can be checked before the first cell runs: inputs, budget, methods, rows, and the
directory."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uniapl
from uniapl.compare.plan import OF_THE_RUN, Plan, Variant
from uniapl.compare.sampling import HELD_OUT, VALIDATION
from uniapl.config.resolve import Resolved, explicit, resolve, stages_of
from uniapl.config.section import flatten
from uniapl.errors import UsageError
from uniapl.evaluation import Suite
from uniapl.evaluation.contamination import overlap
from uniapl.files import write_text
from uniapl.models.loading import check_policy
from uniapl.rewards.finding import find_function
from uniapl.training.build_teacher import check_teacher
from uniapl.training.inputs import RunInputs
from uniapl.training.preflight.checks import check_stage
from uniapl.training.preflight.epochs import with_max_steps
from uniapl.training.preflight.load import load_inputs
from uniapl.types import Example, derive_seed, prompt_text

CUT_FRACTION, CUT_MOST, CUT_LEAST = 0.1, 128, 10
"""A suite that is cut from the training rows has this fraction of their prompts, and at most so many; a cut
needs at least so many prompts."""
STATE = "comparison.json"
"""What the cells of a directory belong to."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A comparison that can run."""

    plan: Plan
    cut: Mapping[str, Sequence[int]]
    """Suite -> numbers of the training rows that form it."""
    main: tuple[str, str]
    """Suite and score by which methods are compared."""
    main_is_trained: bool
    """Whether the score is the reward, or a reward function, that a method is trained on."""
    fingerprint: Mapping[str, str]
    """What the outcomes depend on, besides methods and seeds -> its digest or value."""
    notes: Sequence[str]

    @property
    def base(self) -> dict[str, Any]:
        """The recipe of the model before training, with the trackers of all runs."""
        given = explicit(self.plan.resolved)
        keys = ("model", "data", "rollout", "rewards", "evaluation", "report_to", "run_group")
        return {key: given[key] for key in keys if key in given}


def prepare(resolved: Resolved, variants: Sequence[Variant], *, search: bool) -> Prepared:
    """Load the inputs and check that every method can be trained and measured.

    Raises:
        UsageError: The first problem.
    """
    if not resolved.config.evaluation.suites:
        raise UsageError(
            "evaluation.suites is empty: a comparison measures every method on held-out prompts; name a file "
            "or a benchmark, such as --evaluation.suites held_out.jsonl"
        )
    stages = stages_of(resolved)
    inputs = load_inputs(resolved, stages)
    check_policy(inputs.source, resolved.config.model)
    stages = [with_max_steps(stage, inputs.dataset, inputs.rewarder) for stage in stages]
    plan = Plan(resolved=resolved, stages=[stage.config for stage in stages])
    cut: dict[str, list[int]] = {}
    if not any(example.demonstration_ids for suite in inputs.suites for example in suite.examples):
        shown = [example for example in inputs.dataset.examples if example.demonstration_ids is not None]
        cut[HELD_OUT] = _cut(shown, HELD_OUT, inputs, "the suites have no completions to compare with, and ")
    if search:
        left = [e for e in inputs.dataset.examples if e.row not in set(cut.get(HELD_OUT, ()))]
        cut[VALIDATION] = _cut(left, VALIDATION, inputs, "--search needs validation prompts, and ")
    for variant in variants:
        _check(variant, plan, inputs)
    first = inputs.suites[0]
    return Prepared(
        plan=plan,
        cut=cut,
        main=(first.name, first.headline),
        main_is_trained=_is_trained(plan, variants, first.headline),
        fingerprint=_fingerprint(plan, inputs),
        notes=[*inputs.notes, *_overlaps(inputs)],
    )


def _is_trained(plan: Plan, variants: Sequence[Variant], score: str) -> bool:
    """Whether a method is trained on what the score of a suite measures."""
    config = plan.resolved.config
    measured = {"reward": None, "prompt_strict": "instruction_following"}
    name = measured[score] if score in measured else config.evaluation.metrics[0]
    rewarded = name is None or name in {function.name for function in config.rewards.functions}
    stages = [stage for variant in variants for stage in stages_of(resolve(plan.recipe(variant, {}, 0)))]
    return rewarded and any(stage.config.objective.learns_from_rewards for stage in stages)


def _overlaps(inputs: RunInputs) -> list[str]:
    """Notes on suites whose prompts are trained on."""
    ours = [prompt_text(example.prompt) for example in inputs.dataset.examples]
    found = {s.name: overlap(ours, [prompt_text(e.prompt) for e in s.examples]).exact for s in inputs.suites}
    return [
        f"{len(exact)} training prompts are also in the suite '{name}', whose scores are therefore not those "
        "of held-out prompts (uniapl check lists them)"
        for name, exact in found.items()
        if exact
    ]


def _check(variant: Variant, plan: Plan, inputs: RunInputs) -> None:
    """Check that the recipe's data feeds every stage of a method."""
    try:
        for stage in stages_of(resolve(plan.recipe(variant, {}, 0))):
            check_stage(stage.config, inputs.dataset, inputs.rewarder)
            check_teacher(stage.config, inputs.tokenizer, inputs.dataset.examples)
    except UsageError as error:
        raise UsageError(f"--methods '{variant.label}': {error}") from error


def _cut(examples: Sequence[Example], name: str, inputs: RunInputs, why: str) -> list[int]:
    """The rows of some prompts: always the same, and all rows of a prompt."""
    prompts = {example.prompt_ids for example in examples}
    if len(prompts) < CUT_LEAST:
        what = "demonstrations" if name == HELD_OUT else "prompts"
        raise UsageError(
            f"{why}{len(prompts)} training {what} are too few to hold some out (at least {CUT_LEAST}): add "
            + ("completions to the rows of evaluation.suites" if name == HELD_OUT else "rows")
        )
    count = min(CUT_MOST, max(1, round(CUT_FRACTION * len(prompts))))
    chosen = set(sorted(prompts, key=lambda ids: derive_seed(0, name, *ids))[:count])
    return [example.row for example in inputs.dataset.examples if example.prompt_ids in chosen]


def _fingerprint(plan: Plan, inputs: RunInputs) -> dict[str, str]:
    given = explicit(plan.resolved)
    settings = {key: value for key, value in given.items() if key not in OF_THE_RUN}
    config = plan.resolved.config
    names = [*(function.name for function in config.rewards.functions), *config.evaluation.metrics]
    names += [*config.rollout.tools, *([config.rollout.environment] if config.rollout.environment else [])]
    found = {f"recipe key {key}": json.dumps(value) for key, value in flatten(settings).items()}
    found |= {"budget": str(plan.budget), "training rows": inputs.data_sha256}
    found |= {f"suite '{suite.name}'": _digest_suite(suite) for suite in inputs.suites}
    found |= {f"file of '{name}'": digest for name in names if (digest := _digest_source(name))}
    found["chat template"] = hashlib.sha256(str(inputs.tokenizer.chat_template).encode()).hexdigest()
    if config.teacher.model_name_or_path is not None:
        found["teacher's files"] = _digest_model(Path(config.teacher.model_name_or_path))
    return {**found, "model files": _digest_model(Path(inputs.source.base), inputs.source.adapter)}


def _digest_suite(suite: Suite) -> str:
    rows = [(example.prompt, example.demonstration, example.columns) for example in suite.examples]
    return hashlib.sha256(json.dumps(rows, default=repr, sort_keys=True).encode()).hexdigest()


def _digest_source(name: str) -> str | None:
    """The digest of the file of a reward function, metric, tool or environment of the user."""
    path = inspect.getsourcefile(inspect.unwrap(find_function(name)))
    if path is None or Path(path).is_relative_to(Path(uniapl.__file__).parent):
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _digest_model(*directories: Path | None) -> str:
    """The digest of the files of local models."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.glob("*")) if directory and directory.is_dir() else ():
            if path.suffix in (".safetensors", ".bin", ".json", ".jinja"):
                with path.open("rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def recorded_threads(directory: Path) -> int | None:
    """The threads of each run with which a comparison was begun; None if none was, or if it is not known."""
    path = directory / STATE
    return json.loads(path.read_text(encoding="utf-8")).get("threads") if path.exists() else None


def claim(directory: Path, prepared: Prepared, *, threads: int | None = None) -> None:
    """Note in the directory what its cells belong to, or check that they belong to this comparison.

    Args:
        threads: Threads of each run, noted when the comparison is begun; None only checks.

    Raises:
        UsageError: The recipe, the data or another input has changed since.
    """
    path = directory / STATE
    ours = {
        **prepared.fingerprint,
        **{f"rows of {name}": json.dumps(rows) for name, rows in prepared.cut.items()},
    }
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))["inputs"]
        # A search may be added later; the rows that it cuts follow from the data.
        optional = f"rows of {VALIDATION}"
        changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        changed = [key for key in changed if key != optional or (key in theirs and key in ours)]
        if changed:
            raise UsageError(
                f"'{directory}' holds cells of another comparison, since when these have changed: "
                f"{', '.join(changed)}. Choose another --output-dir, or delete the directory to run "
                "all cells again"
            )
        ours = {**theirs, **ours}
    if threads is not None:
        state = {"inputs": ours, "threads": recorded_threads(directory) or threads}
        write_text(path, json.dumps(state, indent=1))
