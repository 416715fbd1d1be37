"""The loss on several turns of a conversation equals that on one sequence with a mask."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from support.tiny import make_model, make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.batching import component_counts, demonstration_rows, micro_batches
from uniapl.data.rows import tokenize_rows
from uniapl.functional.losses import sft_loss
from uniapl.models.policy import Policy

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% endif %}"
)
CHATS = [
    [("user", "hi"), ("assistant", "yo"), ("user", "why not"), ("assistant", "so.")],
    [("system", "be"), ("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "f"), ("user", "g")],
]


@pytest.mark.parametrize("packed", [False, True])
def test_all_turns_count_each_trained_token_once(packed: bool) -> None:
    tokenizer, model = make_tokenizer(chat_template=TEMPLATE), make_model()
    chats = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    rows_: list[Any] = list(enumerate(({"messages": chat} for chat in chats), start=1))
    examples = tokenize_rows(rows_, tokenizer, DataConfig(train_on="all")).examples

    total, tokens = torch.zeros(()), 0
    for chat in chats:
        ids: list[int] = []
        labels: list[int] = []
        for message in chat:
            head = tokenizer(f"<turn>{message['role'][0]}").input_ids
            body = tokenizer(f"{message['content']}<eos>").input_ids
            ids += head + body
            labels += [-100] * len(head) + (body if message["role"] == "assistant" else [-100] * len(body))
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        tokens += sum(label != -100 for label in labels)
    (total / tokens).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # pyright: ignore
    model.zero_grad()

    rows = [row for example in examples for row in demonstration_rows(example)]
    assert component_counts(rows)["sft"] == tokens == 3 + 4 + 4 + 2
    policy, got = Policy(model), torch.zeros(())
    for batch in micro_batches(rows, pad_id=0, max_tokens=60, packed=packed):
        logprobs, _ = policy(
            batch.input_ids,
            batch.attention_mask,
            batch.position_ids,
            batch.sft_mask,
            batch.temperature,
            batch.spans,
        )
        loss = sft_loss(logprobs, batch.sft_mask, token_weight="none") / tokens
        loss.backward()
        got = got + loss.detach()
    torch.testing.assert_close(got, (total / tokens).detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)
