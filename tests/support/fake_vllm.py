"""A fake vLLM, in the process and behind HTTP: the local sampler with the weights that were sent last."""

import importlib.machinery
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.tiny import make_tokenizer
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings, StopStrings
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
        """Reports log-probabilities at temperature 1 (raw_logprobs)."""
        self.cached = False
        """The prefix cache was computed with older weights."""
        self.reads_text = True
        """Has a tokenizer, without which it finds no stop strings."""

    def load(self, directory: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory)

    def reload(self, directory: str) -> None:
        self.loads += 1
        self.cached = True
        if not self.deaf:
            self.load(directory)

    def answer(self, prompt: Sequence[int], asked: dict[str, Any]) -> Found:
        assert asked["ignore_eos"]
        assert not self.cached
        assert asked["logprobs"] == 0
        assert self.reads_text or "stop" not in asked

        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        settings = SamplingSettings(
            max_completion_length=asked["max_tokens"],
            stop_ids=asked["stop_token_ids"],
            stop_strings=StopStrings.of(asked.get("stop", ()), make_tokenizer()),
            **{name: asked[name] for name in names},
        )
        sampler = LocalSampler(model=self.model, settings=settings, pad_id=0)
        request = SampleRequest(prompts=[tuple(prompt)], seeds=[asked["seed"]], num_generations=asked["n"])
        return [self._reported(prompt, rollout, settings) for rollout in sampler.sample(request)[0]]

    @torch.inference_mode()
    def _reported(self, prompt: Sequence[int], rollout: Rollout, settings: SamplingSettings) -> Rollout:
        """The rollout with the log-probabilities of the mode."""
        ids = torch.tensor([[*prompt, *rollout.completion_ids]])
        found: list[float] = []
        for place, logits in enumerate(self.model(ids).logits[0], start=1):
            if len(prompt) <= place < ids.shape[1]:
                scores: Any = logits.unsqueeze(0)
                scores = scores if self.raw else settings.processors(ids[:, :place], scores)  # type: ignore[arg-type]
                found.append(float(scores.log_softmax(-1)[0, ids[0, place]]))
        return replace(rollout, sampling_logprobs=tuple(found))


def install(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Install a fake module `vllm`; return the list of the engines that are started."""
    started: list[Any] = []

    class LLM(FakeVLLM):
        def __init__(self, model: str, **settings: Any) -> None:
            super().__init__(model)
            self.settings = settings
            self.raw = settings["logprobs_mode"] == "raw_logprobs"
            self.reads_text = not settings["skip_tokenizer_init"]
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
        elif handler.path == "/v1/models":
            send(handler, {"data": [{"id": "served", "root": str(self.directory)}]})
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
