"""A fake vLLM, in the process and behind HTTP: the local sampler with the weights that were sent last."""

import importlib.machinery
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.types import Rollout

Found = Sequence[Rollout]


class FakeVLLM:
    """The common part of both; `deaf` and `raw` imitate faults of vLLM."""

    def __init__(self, directory: Path | str) -> None:
        self.load(str(directory))
        self.loads = 0
        self.deaf = False
        """Confirms new weights and ignores them."""
        self.raw = False
        """Reports log-probabilities at temperature 1."""
        self.cached = False
        """The prefix cache was computed with older weights."""

    def load(self, directory: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory)

    def reload(self, directory: str) -> None:
        self.loads += 1
        self.cached = True
        if not self.deaf:
            self.load(directory)

    def answer(self, prompt: Sequence[int], asked: dict[str, Any]) -> Found:
        assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1, 0, 0, 1)
        assert asked["ignore_eos"]
        assert not self.cached
        assert asked["logprobs"] == 0

        def sample(temperature: float) -> Found:
            sampler = LocalSampler(
                model=self.model,
                stop_ids=asked["stop_token_ids"],
                pad_id=0,
                max_completion_length=asked["max_tokens"],
                temperature=temperature,
            )
            request = SampleRequest(
                prompts=[tuple(prompt)], seeds=[asked["seed"]], num_generations=asked["n"]
            )
            return sampler.sample(request)[0]

        # Log-probabilities at temperature 0 are those at temperature 1.
        return sample(0.0 if self.raw else asked["temperature"])


def install(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Install a fake module `vllm`; return the list of the engines that are started."""
    started: list[Any] = []

    class LLM(FakeVLLM):
        def __init__(self, model: str, **settings: Any) -> None:
            super().__init__(model)
            self.settings = settings
            started.append(self)

        def collective_rpc(self, method: str, timeout: float, kwargs: dict[str, str]) -> list[None]:
            assert method == "reload_weights"
            self.reload(kwargs["weights_path"])
            return [None]

        def reset_prefix_cache(self) -> bool:
            self.cached = False
            return True

        def generate(self, rows: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
            return [
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(
                            token_ids=list(r.completion_ids),
                            logprobs=[
                                {token: SimpleNamespace(logprob=logprob)}
                                for token, logprob in zip(r.completion_ids, r.sampling_logprobs, strict=True)
                            ],
                        )
                        for r in self.answer(row["prompt_token_ids"], vars(one))
                    ]
                )
                for row, one in zip(rows, params, strict=True)
            ]

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None, origin="fake")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return started


class FakeServer(FakeVLLM):
    """Responds like `vllm serve`; it can die and restart with its initial weights."""

    def __init__(self, directory: Path | str) -> None:
        super().__init__(directory)
        self.directory = directory
        self.url = ""
        self.asked: list[str] = []
        """Paths of all requests."""
        self.dies_at: set[int] = set()
        """Numbers of the completion requests, counted from 1, at which it dies."""
        self.gone_for = 0
        """Requests without a response after it died."""
        self.refuses = False
        """It was started without its development endpoints."""
        self.hangs = False
        self._left = 0

    def respond(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.asked.append(handler.path)
        if self._left:
            self._left -= 1
            handler.connection.close()
        elif handler.path == "/health":
            send(handler, None)
        elif handler.path == "/v1/completions" and self.asked.count("/v1/completions") in self.dies_at:
            self.load(str(self.directory))
            self._left = self.gone_for
            handler.connection.close()
        elif handler.path == "/v1/completions":
            answers = self.answer(body["prompt"], body)
            choices = [
                {
                    "index": number,
                    "token_ids": list(r.completion_ids),
                    "logprobs": {"token_logprobs": list(r.sampling_logprobs)},
                }
                for number, r in enumerate(answers)
            ]
            send(handler, {"choices": choices[::-1]})
        elif self.refuses:
            send(handler, {"detail": "Not Found"}, 404)
        elif handler.path == "/collective_rpc":
            self.reload(body["kwargs"]["weights_path"])
            send(handler, {"results": [None]})
        else:
            assert handler.path == "/reset_prefix_cache"
            self.cached = False
            send(handler, {"success": True})


def send(handler: BaseHTTPRequestHandler, answer: Any, status: int = 200) -> None:
    body = b"" if answer is None else json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """Serve the fake behind a URL, one request at a time."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fake.hangs and self.path == "/v1/completions":
                time.sleep(2)
            with turn:
                fake.respond(self, json.loads(content) if content else None)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def behind(fake: FakeServer, **settings: Any) -> dict[str, Any]:
    """The rollout settings with which a run uses it."""
    return {
        "sampler": "vllm",
        "vllm_mode": "server",
        "vllm_server_base_url": fake.url,
        "vllm_timeout": 30.0,
    } | settings
