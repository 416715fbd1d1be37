"""A stand-in for `vllm serve` as a teacher: log-probabilities of prompts, and the tokenizer's ids."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from support.fake_vllm import FakeServer, send


class TeacherStandIn(FakeServer):
    """Answers /tokenize and /v1/completions with `prompt_logprobs`; faults as a test wants."""

    def __init__(self, directory: Path | str) -> None:
        super().__init__(directory)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.shift = 0
        """Added to every token id of /tokenize: another tokenizer."""
        self.max_model_len = 128
        self.missing = False
        """Responds without log-probabilities."""

    def respond(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.asked.append(handler.path)
        if handler.path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            answer = {"tokens": [i + self.shift for i in ids], "max_model_len": self.max_model_len}
            return send(handler, answer)
        assert handler.path == "/v1/completions"
        assert body["max_tokens"] == 1
        found = None if self.missing else self.prompt_logprobs(body["prompt"], body["prompt_logprobs"])
        return send(handler, {"choices": [{"prompt_logprobs": found}]})

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM: none for the first token; else the k most likely ones and the token itself."""
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[dict[str, Any] | None] = [None]
        for position, token in enumerate(ids[1:]):
            row = logprobs[position]
            chosen = {token, *row.topk(k).indices.tolist()}
            found.append({str(t): {"logprob": float(row[t]), "decoded_token": "?"} for t in chosen})
        return found
