"""A run whose tools hang, raise, end the program, flood and change the process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from integration.test_tools import Scripted, right, rows
from integration.test_tools_on_processes import save_start
from integration.test_tools_on_processes import values as tool_recipe
from support.runs import lines, train
from uniapl.rollout import SampleRequest
from uniapl.training import build_sampler
from uniapl.types import Rollout

BODIES = {
    "hang": "time.sleep(60)",
    "leave": "sys.exit('left')",
    "interrupt": "raise KeyboardInterrupt",
    "exhaust": "raise MemoryError",
    "flood": "return 'x' * 1_000_000",
    "move": "print('moved ' * 1000); os.chdir('/'); return 'moved'",
}
RESULTS = {
    "hang": {"error": "'hang' did not answer within 0.2 s"},
    "leave": {"error": "SystemExit('left')"},
    "interrupt": {"error": "KeyboardInterrupt()"},
    "exhaust": {"error": "MemoryError()"},
    "flood": "x" * 60 + "... (999940 more characters)",
    "move": "moved",
}


class Wild(Scripted):
    """Calls one of the tools, or writes a call that cannot be read; then answers."""

    def turn(self, prompt: tuple[int, ...], seed: int, request: SampleRequest) -> Rollout:
        rollout = super().turn(prompt, seed, request)
        kind = [*BODIES, None][seed % 7]
        call = f'<tool_call>\n{{"name": "{kind}", "arguments": {{}}}}\n</tool_call>'
        if "<tool_response>" in str(self.tokenizer.decode(list(prompt))):
            call = "done"
        elif kind is None:
            call = "<tool_call>\n{"
        ids = tuple(self.tokenizer(call + "<|im_end|>", add_special_tokens=False).input_ids)
        return Rollout(
            completion_ids=ids,
            sampling_logprobs=(-1.0,) * len(ids),
            finish_reason="stop",
            policy_version=rollout.policy_version,
        )


def test_a_run_with_wild_tools_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call has its documented result, and the run writes all of its files."""
    monkeypatch.setattr(build_sampler, "LocalSampler", Wild)
    monkeypatch.chdir(tmp_path)
    save_start(tmp_path)
    functions = [f'def {name}() -> str:\n    """Do it."""\n    {body}\n' for name, body in BODIES.items()]
    (tmp_path / "wild.py").write_text("import os, sys, time\n\n" + "\n".join(functions))
    values: dict[str, Any] = tool_recipe(tmp_path, Path("run"), max_steps=2, eval_steps=0)
    values["rollout"] |= {
        "tools": [f"wild.py:{name}" for name in BODIES],
        "tool_timeout": 0.2,
        "max_tool_result_length": 60,
        "num_generations": 8,
    }
    train(values, train_dataset=rows(), reward_functions=[right])
    assert Path.cwd() == Path("/"), "a tool has changed the directory"
    os.chdir(tmp_path)
    records = lines(Path("run") / "metrics.jsonl")
    assert len(records) == 2
    assert (Path("run") / "final" / "model.safetensors").is_file()
    seen: set[str] = set()
    failed = malformed = 0
    for line in lines(Path("run") / "completions.jsonl"):
        for one in line["completions"]:
            if len(one["messages"]) == 1:
                malformed += 1
                continue
            name, content = one["messages"][1]["name"], one["messages"][1]["content"]
            expected = RESULTS[name]
            assert (content if isinstance(expected, str) else json.loads(content)) == expected
            seen.add(name)
            failed += not isinstance(expected, str)
    assert seen == {*BODIES}
    assert malformed
    assert sum(record["tools/malformed"] for record in records) * 24 == pytest.approx(malformed)
    calls = [record["tools/call_frequency"] * 24 for record in records]
    failures = [r["tools/failure_frequency"] * c for r, c in zip(records, calls, strict=True)]
    assert sum(failures) == pytest.approx(failed)
