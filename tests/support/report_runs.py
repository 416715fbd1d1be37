"""Directories that look like runs, of any size, written without training anything."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from uniapl.config.resolve import resolve

WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u") for c in ("", "n", "r", "st")]


def write_run(
    path: Path,
    metrics: list[dict[str, Any]],
    completions: list[dict[str, Any]] | None = None,
    *,
    end_state: dict[str, str] | None = None,
    **recipe: Any,
) -> Path:
    """A run directory with these records."""
    path.mkdir(parents=True)
    values = {"output_dir": str(path), "model": {"model_name_or_path": "base"}, **recipe}
    config = resolve(values).config.model_dump(mode="json", exclude={"resume", "overwrite"})
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {"versions": {"uniapl": "0.1.0"}, "model": "base", "data": {"path": "train.jsonl"}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "completions.jsonl", completions or [])
    if end_state is not None:
        (path / "ending.json").write_text(json.dumps(end_state))
    return path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metric_rows(steps: int) -> list[dict[str, Any]]:
    """Steps of a run with all loss components: the reward rises to 0.9, nll falls."""
    rng = random.Random(0)
    return [
        {
            "step": step,
            "stage": 0,
            "loss": 1.0 - 0.5 * step / steps,
            **{f"loss/{name}": rng.gauss(0.0, 0.1) for name in ("sft", "rl", "adv", "kl")},
            "reward": 0.1 + 0.8 * step / steps,
            "reward_std": 0.1,
            "sft/nll": 2.0 - step / steps,
            "weight/mu": 0.5,
            "weight/lambda_adv": 1.0,
            "grad_norm": rng.lognormvariate(0.0, 0.5),
            "discriminator/win_rate": rng.random(),
            "discriminator/accuracy": rng.random(),
            "completions/mean_length": rng.gauss(30.0, 3.0),
            "rollout/entropy_estimate": rng.random(),
            "learning_rate": 1e-4,
            "num_tokens": 100 * step,
            "skipped": 0,
            "step_time": 2.0,
            "time/rollout": 0.5,
            "time/update": 1.5,
        }
        for step in range(1, steps + 1)
    ]


def answer(text: str = "yes", **changes: Any) -> dict[str, Any]:
    """A completion as completions.jsonl has it."""
    return {
        "text": text,
        "tokens": max(1, len(text.split())),
        "finish_reason": "stop",
        "reward": 1.0,
        "rewards": {"right": 1.0},
        "advantage": 0.0,
        "win_rate": 0.5,
    } | changes


def prompt_row(step: int, answers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A line of completions.jsonl."""
    return {
        "step": step,
        "row": 1,
        "prompt": "Is it so?",
        "demonstration": "It is.",
        "demonstration_tokens": 3,
        "completions": answers,
    } | changes


def many_completions(steps: int, prompts: int, generations: int, words: int) -> list[dict[str, Any]]:
    """Random texts of about so many words: they compress no better than prose does."""
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    asked = [text(12) for _ in range(200)]
    experts = [text(words) for _ in asked]
    return [
        prompt_row(
            step,
            [
                answer(
                    text(rng.randint(words // 2, words * 3 // 2)),
                    reward=rng.random(),
                    rewards={"right": float(rng.random() < 0.5)},
                    win_rate=rng.random(),
                    advantage=rng.gauss(0.0, 1.0),
                    finish_reason=rng.choice(("stop", "length")),
                )
                for _ in range(generations)
            ],
            row=(row := rng.randrange(len(asked))),
            prompt=asked[row],
            demonstration=experts[row],
            demonstration_tokens=words,
        )
        for step in range(1, steps + 1)
        for _ in range(prompts)
    ]


def large_run(path: Path, *, words: int = 60) -> Path:
    """1,000 steps with 20,000 answers."""
    end_state = {"state": "finished", "message": ""}
    rows = many_completions(1000, 4, 5, words)
    return write_run(path, metric_rows(1000), rows, end_state=end_state, max_steps=1000)


def calling(*names: str, **arguments: Any) -> dict[str, Any]:
    """A turn that calls tools, as a message of completions.jsonl."""
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names]
    return {"role": "assistant", "content": "calls", "tool_calls": calls}


def trajectory(
    messages: list[dict[str, Any]], segments: list[str], use: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A completion with tools; its segments are written and given in turn."""
    counts = {"calls": 0, "failures": [], "malformed": 0, "unanswered": 0}
    return answer("".join(segments)) | {
        "messages": messages,
        "segments": alternating(segments),
        "tool_use": counts | (use or {}),
        **changes,
    }


def alternating(segments: list[str]) -> list[dict[str, Any]]:
    """Segments of completions.jsonl, the first one written."""
    return [{"written": number % 2 == 0, "text": text} for number, text in enumerate(segments)]
