"""Local and served teachers against the model's own logits; faults of the server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from support.fake_vllm import serving
from support.teacher_server import TeacherStandIn
from support.tiny import make_model, make_tokenizer, random_rows, save_model
from uniapl.data.batching import Row, collate, micro_batches
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.policy import Policy
from uniapl.teacher.local import LocalTeacher
from uniapl.teacher.server import TeacherServer
from uniapl.training.oom_retry import teach_in_parts
from uniapl.types import MicroBatch

ROWS = random_rows(count=7)


def expected_of(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """[N, V] of the completion's tokens, from one unpadded sequence."""
    with torch.no_grad():
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = model(ids).logits[0].float() / row.temperature
    return logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]


def assert_right(
    batches: list[MicroBatch], rows: list[list[Row]], model: PreTrainedModel, top_k: int
) -> None:
    seen = 0
    for batch, part in zip(batches, rows, strict=True):
        assert batch.teacher_logprobs is not None
        outside = batch.teacher_logprobs[~batch.rollout_mask]
        assert_close(outside, torch.zeros_like(outside))
        for number, row in enumerate(part):
            found = batch.teacher_logprobs[number][batch.rollout_mask[number]]
            if "kl" not in row.components:
                assert not len(found)
                continue
            seen += 1
            full = expected_of(model, row)
            if top_k:
                assert batch.teacher_ids is not None
                top = full.topk(top_k)
                assert_close(found, top.values, atol=1e-4, rtol=1e-4)
                assert_close(batch.teacher_ids[number][batch.rollout_mask[number]], top.indices)
            else:
                assert batch.teacher_ids is None
                own = full.gather(-1, torch.tensor(row.completion_ids).unsqueeze(-1))
                assert_close(found, own, atol=1e-4, rtol=1e-4)
    assert seen == sum("kl" in row.components for part in rows for row in part)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2_softcap"])
def test_a_local_teacher(family: str, packed: bool, top_k: int) -> None:
    model = make_model(family, seed=5)
    parts = [ROWS[:3], ROWS[3:]]
    teacher = LocalTeacher(model=Policy(model), top_k=top_k)
    batches = teacher.read([collate(part, pad_id=0, packed=packed) for part in parts])
    assert_right(batches, parts, model, top_k)


@pytest.mark.parametrize("top_k", [0, 2])
def test_what_does_not_fit_is_read_in_parts(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(seed=5)
    policy = Policy(model)
    hidden = Policy._hidden

    def scarce(self: Policy, inputs: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(self, inputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "_hidden", scarce)
    batches = teach_in_parts(
        LocalTeacher(model=policy, top_k=top_k),
        [collate(ROWS[:2], pad_id=0), collate(ROWS[2:], pad_id=0)],
    )
    assert_right(batches, [ROWS[:2], ROWS[2:]], model, top_k)
    monkeypatch.setattr(
        Policy, "_hidden", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(UniAPLError, match="the teacher cannot read one row of"):
        teach_in_parts(LocalTeacher(model=policy, top_k=top_k), [collate(ROWS, pad_id=0)])


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[TeacherStandIn]:
    with serving(TeacherStandIn(save_model(tmp_path / "teacher", seed=5))) as server:
        assert isinstance(server, TeacherStandIn)
        yield server


def client(fake: TeacherStandIn, top_k: int = 0) -> TeacherServer:
    return TeacherServer(url=fake.url + "/", top_k=top_k, timeout=20.0, max_retries=0)


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_served_teacher(fake: TeacherStandIn, top_k: int) -> None:
    rows = [Row(**{**vars(row), "temperature": 1.0}) for row in ROWS]
    parts = [rows[:4], rows[4:]]
    batches = [*(collate(part, pad_id=0) for part in parts), *micro_batches([], pad_id=0, max_tokens=9)]
    found = client(fake, top_k).read(batches)
    assert_right(found[:2], parts, fake.model, top_k)
    assert found[2].teacher_logprobs is not None
    assert fake.asked.count("/v1/completions") == sum("kl" in row.components for row in rows)


def test_a_left_padded_batch(fake: TeacherStandIn) -> None:
    rows = [Row(**{**vars(row), "temperature": 1.0}) for row in ROWS]
    assert_right(client(fake).read([collate(rows, pad_id=0, padding_side="left")]), [rows], fake.model, 0)


def test_a_server_that_fits_passes(fake: TeacherStandIn) -> None:
    client(fake).check(make_tokenizer(), ["say a."], 127)


def test_another_tokenizer_is_refused(fake: TeacherStandIn) -> None:
    fake.shift = 1
    with pytest.raises(UsageError, match=r"a teacher needs the policy's tokenizer"):
        client(fake).check(make_tokenizer(), ["say a."], 20)


def test_a_short_context_is_refused(fake: TeacherStandIn) -> None:
    with pytest.raises(UsageError, match=r"reads at most 128 tokens.*--max-model-len 129"):
        client(fake).check(make_tokenizer(), ["say a."], 128)


def test_a_server_that_is_not_there_is_refused() -> None:
    server = TeacherServer(url="http://127.0.0.1:9", top_k=0, timeout=2.0, max_retries=0)
    with pytest.raises(UsageError, match=r"127.0.0.1:9 is not a vLLM server that is ready"):
        server.check(make_tokenizer(), [], 5)


def test_an_answer_without_log_probabilities_ends_the_run(fake: TeacherStandIn) -> None:
    fake.missing = True
    with pytest.raises(UniAPLError, match=r"the teacher's server .* unexpected response.*--resume auto"):
        client(fake).read([collate(ROWS, pad_id=0)])
