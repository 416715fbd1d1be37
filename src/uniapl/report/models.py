"""Analyses that need the models: log-probabilities under the base model and the trained model."""

import json
import statistics
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.analysis import rounded
from uniapl.report.charts import Chart, histogram_chart, line_chart
from uniapl.report.reading import MODEL_ANALYSIS, Record, RunData
from uniapl.report.trajectories import is_trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from uniapl.types import Example

SAMPLES = 64
"""Texts of each kind: enough for the shape of a distribution; seconds on a GPU, minutes on a CPU."""
MAX_POSITIONS = 200
"""Positions that are drawn; too few completions are longer to average over them."""
KINDS = {"expert": "demonstrations", "policy": "completions"}
MODELS = {"base": "base", "final": "trained"}


def analyse_models(run: RunData) -> Record:
    """Score demonstrations and the last completions with the base and the trained model; write analysis.json.

    Returns:
        {"base": name, "final": path,
         "answers": {"expert" | "policy": {
             "count": 64,
             "base" | "final": {"means": [nats per token, one per text],
                                "by_position": [mean over the texts that reach the position]}}}}

    Raises:
        UsageError: The run has no final model, no completions or tools, or a model cannot be loaded.
    """
    from uniapl.config.resolve import resolve
    from uniapl.models.loading import (
        ModelSource,
        load_model,
        load_model_config,
        load_stop_ids,
        load_tokenizer,
    )

    final = run.directory / "final"
    if not final.is_dir():
        raise UsageError(f"--model-analysis needs the trained model: '{final}' does not exist yet")
    if any(is_trajectory(completion) for record in run.completions for completion in record["completions"]):
        raise UsageError(
            "--model-analysis does not score completions with results of tools; leave it out for this run"
        )
    config = resolve({key: run.config[key] for key in ("model", "data")}).config
    source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(source)
    stop_ids = load_stop_ids(source, load_model_config(source), tokenizer)
    examples = _examples(run, tokenizer, config.data, stop_ids)
    found: Record = {
        "base": str(config.model.model_name_or_path),
        "final": str(final),
        "answers": {kind: {"count": len(rows)} for kind, rows in examples.items()},
    }
    for name, path in (("base", None), ("final", final)):
        model = load_model(source.with_weights(path))
        for kind, rows in examples.items():
            found["answers"][kind][name] = _summarized(logprobs(model, rows))
    write_text(run.directory / MODEL_ANALYSIS, json.dumps(found, indent=1))
    return found


def logprobs(model: "PreTrainedModel", examples: Sequence["Example"]) -> list[list[float]]:
    """Log-probability of each demonstration token, in nats; computed on the accelerator, if there is one."""
    import torch

    from uniapl.functional import logprobs_from_logits

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    result: list[list[float]] = []
    for example in examples:
        completion = list(example.demonstration_ids or ())
        ids = torch.tensor([[*example.prompt_ids, *completion]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(completion) - 1 : -1].float()
            temperature = torch.ones(len(completion), device=device)
            found, _ = logprobs_from_logits(logits, ids[0, -len(completion) :], temperature)
        result.append(found.tolist())
    return result


def model_charts(found: Record | None) -> list[Chart]:
    """The charts of an analysis.json; none without it."""
    charts: list[Chart] = []
    for kind, title in KINDS.items():
        if found is None or kind not in found["answers"]:
            continue
        texts = found["answers"][kind]
        means = {label: texts[model]["means"] for model, label in MODELS.items()}
        note = f"{texts['count']} texts; each value is the mean over the tokens of a text."
        charts.append(histogram_chart(f"Log-probability of {title}", "nats per token", means, note))
        lines: list[Chart] = []
        for model, label in MODELS.items():
            y = texts[model]["by_position"]
            lines.append({"label": label, "x": list(range(1, len(y) + 1)), "y": y})
        note = "Mean log-probability at each position, in nats; fewer texts reach the later positions."
        charts.append(line_chart(f"Log-probability by position in {title}", lines, x="token", note=note))
    return charts


def _examples(
    run: RunData, tokenizer: Any, data: Any, stop_ids: Collection[int]
) -> dict[str, Sequence["Example"]]:
    """Prompts with the texts to score as their demonstrations, tokenized as in training."""
    from uniapl.data.rows import tokenize_rows

    # Demonstrations of different prompts, and one completion of each of the last prompts. The end token of a
    # truncated completion was not sampled, so it must not be scored.
    demonstrations = {
        r["row"]: (r["prompt"], r["demonstration"]) for r in run.completions if r["demonstration"]
    }
    completions = [
        (record["prompt"], record["completions"][0]["text"])
        for record in run.completions
        if record["completions"][0]["finish_reason"] == "stop" and record["completions"][0]["text"].strip()
    ]
    if not completions:
        raise UsageError("--model-analysis needs completions that ended with a stop token; the run has none")
    kinds = {"expert": list(demonstrations.values())[:SAMPLES], "policy": completions[-SAMPLES:]}
    unlimited = {"columns": {}, "max_prompt_length": None, "max_demonstration_length": None}
    plain = data.model_copy(update=unlimited)
    return {
        kind: tokenize_rows(
            enumerate(({"prompt": prompt, "completion": text} for prompt, text in pairs), start=1),
            tokenizer,
            plain,
            stop_ids=stop_ids,
        ).examples
        for kind, pairs in kinds.items()
        if pairs
    }


def _summarized(rows: Sequence[Sequence[float]]) -> Record:
    longest = min(MAX_POSITIONS, max(len(row) for row in rows))
    positions = [[row[position] for row in rows if len(row) > position] for position in range(longest)]
    return {
        "means": [rounded(statistics.fmean(row)) for row in rows],
        "by_position": [rounded(statistics.fmean(values)) for values in positions],
    }
