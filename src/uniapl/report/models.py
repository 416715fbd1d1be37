"""What needs the models: how likely the answers are to the base and to the trained model."""

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.analysis import bin_edges, histogram, rounded
from uniapl.report.charts import Chart
from uniapl.report.reading import MODEL_ANALYSIS, Record, RunData

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from uniapl.types import Example

SAMPLES = 64
"""Of each kind of answer: enough for a distribution's shape, seconds on a GPU and minutes on a CPU."""
POSITIONS = 200
"""Positions of an answer that are drawn; further ones have few answers left to average over."""
BINS = 24
ANSWERS = {"expert": "expert's answers", "policy": "policy's answers"}
MODELS = {"base": "base", "final": "trained"}


def analyse_models(run: RunData) -> Record:
    """Score demonstrations and the last answers by the run's base and by its result, and write analysis.json.

    Returns:
        {"base": name, "final": path,
         "answers": {"expert" | "policy": {
             "count": 64,
             "base" | "final": {"means": [nats per token, one per answer],
                                "by_position": [mean over the answers that are so long]}}}}

    Raises:
        UsageError: The run has no final model, no completions, or a model that cannot be loaded.
    """
    from uniapl.config.resolve import resolve
    from uniapl.models.loading import ModelSource, load_model, load_tokenizer

    final = run.directory / "final"
    if not final.is_dir():
        raise UsageError(f"--model-analysis needs the run's result, and there is no '{final}' yet")
    config = resolve({key: run.config[key] for key in ("model", "data")}).config
    source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(source)
    examples = _examples(run, tokenizer, config.data)
    found: Record = {
        "base": str(config.model.model_name_or_path),
        "final": str(final),
        "answers": {kind: {"count": len(rows)} for kind, rows in examples.items()},
    }
    for name, path in (("base", None), ("final", final)):
        model = load_model(source.with_weights(path))
        for kind, rows in examples.items():
            found["answers"][kind][name] = _described(logprobs(model, rows))
    write_text(run.directory / MODEL_ANALYSIS, json.dumps(found, indent=1))
    return found


def logprobs(model: "PreTrainedModel", examples: Sequence["Example"]) -> list[list[float]]:
    """The log-probability in nats of every token of each demonstration, on the accelerator that is there."""
    import torch

    from uniapl.functional import logprobs_from_logits

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    result: list[list[float]] = []
    for example in examples:
        answer = list(example.demonstration_ids or ())
        ids = torch.tensor([[*example.prompt_ids, *answer]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].float()
            found, _ = logprobs_from_logits(
                logits, ids[0, -len(answer) :], torch.ones(len(answer), device=device)
            )
        result.append(found.tolist())
    return result


def model_charts(found: Record | None) -> list[Chart]:
    """The charts of an analysis.json; none without one."""
    if found is None:
        return []
    charts: list[Chart] = []
    for kind, title in ANSWERS.items():
        answers = found["answers"].get(kind)
        if answers is None:
            continue
        means = {label: answers[model]["means"] for model, label in MODELS.items()}
        edges = bin_edges(means.values(), BINS)
        groups = [
            {"label": label, "shares": [rounded(share) for share in histogram(values, edges)]}
            for label, values in means.items()
        ]
        note = f"{answers['count']} answers, each the mean over its tokens."
        charts.append(
            {
                "kind": "histogram",
                "title": f"Log-probability of the {title}",
                "x": "nats per token",
                "edges": [rounded(edge) for edge in edges],
                "groups": groups,
                "note": note,
            }
        )
        lines = [
            {
                "label": label,
                "x": list(range(1, len(answers[model]["by_position"]) + 1)),
                "y": answers[model]["by_position"],
            }
            for model, label in MODELS.items()
        ]
        charts.append(
            {
                "kind": "lines",
                "title": f"Along the {title}",
                "x": "token of the answer",
                "lines": lines,
                "log": False,
                "smooth": False,
                "note": "Mean log-probability at each position, nats; fewer answers reach the later ones.",
            }
        )
    return charts


def _examples(run: RunData, tokenizer: Any, data: Any) -> dict[str, list["Example"]]:
    """Prompts with the answers to score as their demonstrations, tokenised as in training."""
    from uniapl.data.rows import tokenize_row

    # Demonstrations of different prompts, and one answer to each of the last prompts; where an answer was cut
    # at the limit, an end would be scored that nobody wrote.
    experts = {
        record["row"]: record["demonstration"] for record in run.completions if record["demonstration"]
    }
    prompts = {record["row"]: record["prompt"] for record in run.completions}
    rows = {
        "expert": [(prompts[row], text) for row, text in list(experts.items())[:SAMPLES]],
        "policy": [
            (record["prompt"], answer["text"])
            for record in run.completions
            for answer in record["completions"][:1]
            if answer["finish_reason"] == "stop" and answer["text"].strip()
        ][-SAMPLES:],
    }
    if not rows["policy"]:
        raise UsageError("--model-analysis needs sampled answers that came to an end, and the run has none")
    plain = data.model_copy(update={"columns": {}})
    return {
        kind: [
            tokenize_row(count, {"prompt": prompt, "completion": text}, tokenizer, plain)
            for count, (prompt, text) in enumerate(pairs, start=1)
        ]
        for kind, pairs in rows.items()
        if pairs
    }


def _described(rows: Sequence[Sequence[float]]) -> Record:
    longest = min(POSITIONS, max(len(row) for row in rows))
    at = [[row[position] for row in rows if len(row) > position] for position in range(longest)]
    return {
        "means": [rounded(statistics.fmean(row)) for row in rows],
        "by_position": [rounded(statistics.fmean(values)) for values in at],
    }
