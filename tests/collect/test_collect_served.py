"""`uniapl collect` with `transformers serve` and a tiny model."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import GenerationConfig

from support.collecting import write
from support.runs import lines
from support.tiny import save_model
from uniapl import cli

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
)
SERVE = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The server's URL and its model's name."""
    folder = tmp_path_factory.mktemp("served")
    model = save_model(folder / "model", chat_template=TEMPLATE)
    # The server samples only if the model's generation config says so.
    GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0).save_pretrained(model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(model), "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=file, stderr=file)
        try:
            started = time.monotonic()
            while not healthy(port):
                if process.poll() is not None or time.monotonic() - started > 180:
                    pytest.skip(f"transformers serve does not start here: {log.read_text()[-300:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_completions_are_those_of_the_server(
    served: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, model = served
    path = write(tmp_path / "prompts.jsonl", ["say a.", "say b.", "say c."])
    output = tmp_path / "out.jsonl"
    flags = ["--url", url, "--num-samples", "3", "--temperature", "1", "--max-tokens", "60", "--seed", "1"]
    command = ["collect", str(path), "-o", str(output), "--model", model, *flags, "--concurrency", "1"]
    assert cli.run(command) == 0
    # The server appends the revision to the model's name.
    assert f"name a model other than '{model}': {model}@main" in capsys.readouterr().out
    cached = lines(tmp_path / "out.jsonl.cache.jsonl")
    expected = [ask(url, model, prompt, 1 + k) for prompt in "abc" for k in range(3)]
    assert [(one["content"], one["finish_reason"]) for one in cached] == expected
    usable = [text for text, reason in expected if reason == "stop" and text.strip()]
    assert [row["completion"] for row in lines(output)] == usable
    assert 0 < len(usable) < 9, "some are truncated and some are not"
    assert {one["prompt_tokens"] for one in cached} == {8}, "six letters between two turns"
    assert all(0 < one["completion_tokens"] <= 60 for one in cached)


def ask(url: str, model: str, letter: str, seed: int) -> tuple[str, str]:
    messages = [{"role": "user", "content": f"say {letter}."}]
    body = {"model": model, "messages": messages, "temperature": 1.0, "max_tokens": 60, "seed": seed}
    choice = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_a_refused_request(
    served: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = served
    path = write(tmp_path / "prompts.jsonl", ["say a."])
    output = tmp_path / "out.jsonl"
    assert cli.run(["collect", str(path), "-o", str(output), "--url", url, "--model", "other"]) == 1
    assert "(status 400: Server is pinned to" in capsys.readouterr().err
