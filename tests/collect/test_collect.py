"""`uniapl collect`: requests, the training file, the cache, and every kind of failure."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.collecting import write
from support.endpoints import (
    Endpoint,
    Handler,
    Reply,
    completion,
    cuts,
    drips,
    echo,
    first,
    hangs,
    later,
    says,
    send,
    serving,
    status,
)
from support.runs import lines, recipe, write_recipe
from support.tiny import save_model
from uniapl import cli

KEY = "sk-secret-0123456789"
PROMPTS = ["one", "two", "three", "four", "five"]


@pytest.fixture(autouse=True)
def short_pauses_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def collect(
    endpoint: Endpoint | str, folder: Path, *flags: str, prompts: Any = PROMPTS, **columns: Any
) -> int:
    path = write(folder / "prompts.jsonl", prompts, **columns)
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return cli.run(["collect", str(path), "-o", str(folder / "out.jsonl"), "--url", url, *flags])


def completions(folder: Path) -> list[str]:
    return [row["completion"] for row in lines(folder / "out.jsonl")]


def test_a_written_row_has_the_prompt_the_completion_and_its_source(tmp_path: Path) -> None:
    with serving() as endpoint:
        flags = ["--temperature", "0.5", "--top-p", "0.9", "--max-tokens", "50", "--seed", "7"]
        flags += ["--system-prompt", "Be brief.", "--extra-body", '{"chat_template_kwargs": {"a": false}}']
        assert collect(endpoint, tmp_path, *flags, prompts=["one"], letter="x", empty=None) == 0
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 50, "chat_template_kwargs": {"a": False}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    assert endpoint.asked == [{"model": "expert", "messages": messages, **sampling, "seed": 7}]
    assert endpoint.keys == {f"Bearer {KEY}"}
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["source"].pop("date").endswith("+00:00")
    assert row == {
        "prompt": "one",
        "letter": "x",
        "empty": None,
        "completion": "ONE",
        "source": {
            "model": "expert",
            "url": endpoint.url,
            "settings": {**sampling, "seed": 7, "system_prompt": "Be brief."},
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            "sample": 0,
        },
    }


def test_a_request_without_options_has_only_model_and_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving() as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
    assert endpoint.asked == [{"model": "expert", "messages": [{"role": "user", "content": "one"}]}]
    assert endpoint.keys == {None}


def test_rows_keep_their_order_for_any_order_of_replies(tmp_path: Path) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.05 * (5 - PROMPTS.index(body["messages"][-1]["content"])))
        echo(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path) == 0
    assert completions(tmp_path) == ["ONE", "TWO", "THREE", "FOUR", "FIVE"]
    cached = [line["content"] for line in lines(tmp_path / "out.jsonl.cache.jsonl")]
    assert sorted(cached) == sorted(completions(tmp_path))
    assert cached != completions(tmp_path), "the cache has the order of arrival"


def test_each_sample_has_its_own_seed(tmp_path: Path) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        send(handler, completion(f"{body['messages'][-1]['content']} {body['seed']}"))

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, "--num-samples", "3", "--seed", "5", prompts=["a", "b"]) == 0
    assert completions(tmp_path) == ["a 5", "a 6", "a 7", "b 5", "b 6", "b 7"]
    assert [row["source"]["sample"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2, 0, 1, 2]


def test_messages_unicode_and_duplicate_prompts(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": "größe 猫"}]
    rows: list[dict[str, Any]] = [
        {"prompt": chat, "id": 1},
        {"messages": chat[1:], "id": 2},
        {"prompt": "größe 猫\u2028", "id": 3},
        {"prompt": chat, "id": 4},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with serving() as endpoint:
        flags = ["-o", str(tmp_path / "out.jsonl"), "--url", endpoint.url, "--system-prompt", "Kurz."]
        assert cli.run(["collect", str(path), *flags]) == 0
    sent = {json.dumps(body["messages"], ensure_ascii=False) for body in endpoint.asked}
    kurz = {"role": "system", "content": "Kurz."}
    asked = [chat, [kurz, *chat[1:]], [kurz, {"role": "user", "content": "größe 猫\u2028"}]]
    assert sent == {json.dumps(messages, ensure_ascii=False) for messages in asked}
    assert len(endpoint.asked) == 3, "rows 1 and 4 are one request"
    written = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in written] == [1, 2, 3, 4]
    assert all("messages" not in row for row in written), "training would look for the demonstration there"
    assert [row["prompt"] for row in written] == [chat, chat[1:], "größe 猫\u2028", chat]
    assert [row["completion"] for row in written] == [
        "GRÖSSE 猫",
        "GRÖSSE 猫",
        "GRÖSSE 猫\u2028",
        "GRÖSSE 猫",
    ]


@pytest.mark.parametrize("form", ["json", "csv", "parquet"])
def test_prompts_in_other_file_formats(form: str, tmp_path: Path) -> None:
    import pandas

    path = tmp_path / f"prompts.{form}"
    frame = pandas.DataFrame({"prompt": ["11", "two"], "answer": [1, 2]})
    if form == "json":
        path.write_text(frame.to_json(orient="records"))
    elif form == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    with serving() as endpoint:
        flags = ["-o", str(tmp_path / "new" / "out.jsonl"), "--url", endpoint.url]
        assert cli.run(["collect", str(path), *flags]) == 0
    found = [(r["prompt"], r["answer"], r["completion"]) for r in lines(tmp_path / "new" / "out.jsonl")]
    one, two = ("1", "2") if form == "csv" else (1, 2)
    assert found == [("11", one, "11"), ("two", two, "TWO")]


def test_the_only_model_is_the_default_and_several_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(models=("a", "b")) as endpoint:
        assert collect(endpoint, tmp_path) == 2
        assert "has 2 models (a, b): set --model" in capsys.readouterr().err
        assert not endpoint.asked
        assert collect(endpoint, tmp_path, "--model", "b") == 0
    assert {body["model"] for body in endpoint.asked} == {"b"}


# The cache


def test_a_finished_command_sends_no_request_and_writes_the_same_file(tmp_path: Path) -> None:
    with serving() as endpoint:
        assert collect(endpoint, tmp_path, "--model", "expert") == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    # The server is gone.
    assert collect(endpoint, tmp_path, "--model", "expert") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.cache.jsonl",
        "prompts.jsonl",
    ]


def test_only_new_requests_are_sent(tmp_path: Path) -> None:
    with serving() as endpoint:
        assert collect(endpoint, tmp_path, "--limit", "2") == 0
        assert endpoint.counts == {"one": 1, "two": 1}
        assert collect(endpoint, tmp_path) == 0
        assert endpoint.counts == dict.fromkeys(PROMPTS, 1)
        assert collect(endpoint, tmp_path, "--num-samples", "2") == 0
        assert endpoint.counts == dict.fromkeys(PROMPTS, 2)
        assert collect(endpoint, tmp_path, "--temperature", "0.5") == 0
        assert endpoint.counts == dict.fromkeys(PROMPTS, 3)
    assert completions(tmp_path) == [prompt.upper() for prompt in PROMPTS]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_continues_with_the_missing_requests(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    prompts = [f"prompt {n}" for n in range(12)]
    cache = tmp_path / "out.jsonl.cache.jsonl"
    ended = threading.Event()

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] in prompts[5:]:
            ended.wait()
        echo(endpoint, handler, body)

    with serving(reply) as endpoint:
        path = write(tmp_path / "prompts.jsonl", prompts)
        command = ["collect", str(path), "-o", str(tmp_path / "out.jsonl"), "--url", endpoint.url]
        # A process started in the background may ignore SIGINT.
        interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        program = f"{interruptible}; from uniapl import cli; cli.main({[*command, '--concurrency', '3']!r})"
        with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
            while len(endpoint.asked) < 8 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            try:
                _, said = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == code
        assert number == signal.SIGKILL or "the same command continues" in said
        assert not (tmp_path / "out.jsonl").exists()
        kept = [line["content"].lower() for line in lines(cache)]
        assert sorted(kept) == prompts[:5], "a reply is on disk before the next request is sent"
        flying = set(prompts[5:8])
        with cache.open("a") as file:
            file.write('{"key": "half a li')
        ended.set()
        assert cli.run(command) == 0
    assert completions(tmp_path) == [prompt.upper() for prompt in prompts]
    assert endpoint.counts == {prompt: 2 if prompt in flying else 1 for prompt in prompts}
    assert len(lines(cache)) == 12


def test_a_second_process_cannot_use_the_same_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from uniapl.collect.cache import open_cache

    with serving() as endpoint, open_cache(tmp_path / "out.jsonl.cache.jsonl"):
        assert collect(endpoint, tmp_path) == 2
    assert "another process is collecting" in capsys.readouterr().err
    assert not endpoint.asked


# Failures


FAILURES: dict[str, Reply] = {
    "429": status(429, Retry_After="0"),
    "429 without more": status(429),
    "429, an odd date": status(429, Retry_After="tomorrow"),
    "503": status(503, Retry_After="-5"),
    "500": status(500),
    "hangs": hangs,
    "drips": drips,
    "cuts": cuts,
    "no JSON": lambda e, h, b: send(h, b"<html>"),
    "not UTF-8": lambda e, h, b: send(h, b"\xff\xfe"),
    "no choices": lambda e, h, b: send(h, {"choices": []}),
    "a list": lambda e, h, b: send(h, [1]),
    "an error with status 200": lambda e, h, b: send(h, {"error": {"message": "overloaded", "code": 503}}),
    "null": lambda e, h, b: send(h, b"null"),
    "broken off": says("half", finish_reason="abort"),
    "an error as finish reason": says("half", finish_reason="ERROR"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_temporary_failures_are_retried(failure: str, tmp_path: Path) -> None:
    flags = ["--timeout", "1.5"] if failure in ("hangs", "drips") else []
    with serving(first(FAILURES[failure])) as endpoint:
        assert collect(endpoint, tmp_path, *flags) == 0
    assert completions(tmp_path) == [prompt.upper() for prompt in PROMPTS]
    assert endpoint.counts == dict.fromkeys(PROMPTS, 2), "one failure and one success each"


def test_rows_that_always_fail_are_named_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        sick = body["messages"][-1]["content"] in ("two", "five")
        (status(500, {"error": {"message": "CUDA error"}}) if sick else echo)(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, "--max-retries", "2") == 1
        said = capsys.readouterr().err
        assert "no completion for rows 2, 5 (failed 3 times, the last time with: " in said
        assert "status 500: CUDA error)" in said
        assert "The same command requests only what is missing" in said
        assert not (tmp_path / "out.jsonl").exists()
        assert endpoint.counts == {"one": 1, "two": 3, "three": 1, "four": 1, "five": 3}
        endpoint.reply = echo
        assert collect(endpoint, tmp_path, "--max-retries", "2") == 0
        assert endpoint.counts == {"one": 1, "two": 4, "three": 1, "four": 1, "five": 4}
    assert completions(tmp_path) == [prompt.upper() for prompt in PROMPTS]


@pytest.mark.parametrize("asks", [status(429, Retry_After="0.4"), status(503, Retry_After="0.4"), later(0.4)])
def test_retry_after_is_respected(asks: Reply, tmp_path: Path) -> None:
    with serving(first(asks)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
    before, after = endpoint.times["one"]
    assert after - before >= 0.4


@pytest.mark.parametrize("number", [401, 403, 404])
def test_a_refusal_that_concerns_every_request_stops_the_run(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status(number, {"error": {"message": f"no, not with {KEY}"}})) as endpoint:
        assert collect(endpoint, tmp_path, "--concurrency", "1") == 2
    said = capsys.readouterr().err
    assert f"{endpoint.url}: status {number}: no, not with [key]" in said
    assert "OPENAI_API_KEY" in said or number == 404
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("number", [400, 422])
def test_a_refused_row_is_not_retried_and_eight_in_a_row_stop_the_run(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        long = body["messages"][-1]["content"] == "three"
        (status(number, {"message": "too long"}) if long else echo)(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path) == 1
        assert f"no completion for rows 3 (status {number}: too long)" in capsys.readouterr().err
        assert endpoint.counts == dict.fromkeys(PROMPTS, 1)
    many = [f"prompt {n}" for n in range(40)]
    with serving(status(number, {"detail": "temperature must be less than 2"})) as endpoint:
        assert collect(endpoint, tmp_path, "--concurrency", "1", prompts=many) == 2
    assert f"{endpoint.url}: status {number}: temperature must be less than 2" in capsys.readouterr().err
    assert len(endpoint.asked) == 8


def test_failures_with_successes_between_them_do_not_stop_the_run(tmp_path: Path) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        (echo if len(endpoint.asked) % 2 else status(400))(endpoint, handler, body)

    with serving(reply) as endpoint:
        many = [f"prompt {n}" for n in range(30)]
        assert collect(endpoint, tmp_path, "--concurrency", "1", prompts=many) == 1
    assert len(endpoint.asked) == 30


@pytest.mark.parametrize("flags", [[], ["--model", "expert"]])
def test_an_unreachable_server(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as endpoint:
        pass
    assert collect(endpoint, tmp_path, *flags, "--max-retries", "1000") == 1
    assert f"{endpoint.url}: cannot be reached (ConnectError" in capsys.readouterr().err


def test_a_server_that_fails_half_way_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mortal(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        (echo if len(endpoint.asked) <= 3 else status(500))(endpoint, handler, body)

    many = [f"prompt {n}" for n in range(40)]
    flags = ["--max-retries", "1", "--concurrency", "1"]
    with serving(mortal) as endpoint:
        assert collect(endpoint, tmp_path, *flags, prompts=many) == 1
        assert "Replies received so far are kept: the same command continues" in capsys.readouterr().err
        assert len(endpoint.asked) == 3 + 8 * 2
        endpoint.reply = echo
        assert collect(endpoint, tmp_path, prompts=many) == 0
    assert completions(tmp_path) == [prompt.upper() for prompt in many]
    assert [endpoint.counts[prompt] for prompt in many[:3]] == [1, 1, 1]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_bounded_and_used(concurrency: int, tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(12)]
    all_there = threading.Barrier(concurrency, timeout=60)

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        all_there.wait()
        echo(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, "--concurrency", str(concurrency), prompts=prompts) == 0
    assert endpoint.most_at_once == concurrency


def test_the_key_is_never_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when the server repeats the request's headers."""
    for number in (200, 401, 400, 500):
        folder = tmp_path / str(number)
        folder.mkdir()
        repeats = {"error": f"you sent Bearer {KEY}"}
        with serving(echo if number == 200 else status(number, repeats)) as endpoint:
            url = endpoint.url.replace("http://", "http://user:secret@")
            code = collect(url, folder, "--max-retries", "1", "--json")
        assert (code == 0) == (number == 200)
        said = capsys.readouterr()
        written = [path.read_text() for path in folder.iterdir()]
        for text in (said.out, said.err, *written):
            assert KEY not in text
            assert "secret" not in text
        assert number == 200 or "[key]" in said.err


def test_a_key_that_is_invalid_in_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-one\nsk-two")
    with serving() as endpoint:
        assert collect(endpoint, tmp_path, "--api-key-variable", "MY_KEY") == 2
    said = capsys.readouterr().err
    assert "the environment variable MY_KEY contains characters that no API key has" in said
    assert "sk-one" not in said


# Dropped completions


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("half an ans", finish_reason="length"), "truncated; raise --max-tokens"),
        (says("<think>so much to"), "truncated; raise --max-tokens"),
        (says(""), "empty"),
        (says(" \n"), "empty"),
        (says(None), "empty"),
        (says("<think>thought</think>\n"), "empty"),
        (says("half an emoji: \ud83d"), "not valid Unicode"),
        (says("I will not", finish_reason="content_filter"), "refused by a content filter"),
        (says("I will not", finish_reason="SAFETY"), "refused by a content filter"),
        (
            lambda e, h, b: send(h, {"choices": [{"finish_reason": "content_filter"}]}),
            "refused by a content filter",
        ),
        (says(None, refusal="I will not."), "refused by the model"),
        (says("Let me see.", finish_reason="tool_calls"), "a tool call"),
        (says("Let me see.", tool_calls=[{"function": {"name": "look"}}]), "a tool call"),
        (says(None, reasoning_content="thought"), "empty"),
    ],
)
def test_unusable_completions_are_dropped_and_counted_and_not_requested_again(
    reply: Reply, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sometimes(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        bad = body["messages"][-1]["content"] in ("two", "four")
        (reply if bad else echo)(endpoint, handler, body)

    with serving(sometimes) as endpoint:
        for _ in range(2):
            assert collect(endpoint, tmp_path) == 0
            assert f"dropped: 2 completions, {reason}: rows 2, 4" in capsys.readouterr().out
            assert completions(tmp_path) == ["ONE", "THREE", "FIVE"]
        assert endpoint.counts == dict.fromkeys(PROMPTS, 1)
        endpoint.reply = reply
        assert collect(endpoint, tmp_path, "--temperature", "0.1") == 1
    assert "no completion is usable" in capsys.readouterr().err


CUT = ["length", "LENGTH", "MAX_TOKENS", "max_tokens", "max-tokens", "model_length", None, "", "new_reason"]


@pytest.mark.case(13)
@pytest.mark.parametrize("reason", CUT)
def test_a_finish_reason_other_than_a_stop_is_a_truncated_completion(
    reason: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        whole = body["messages"][-1]["content"] == "one"
        (echo if whole else says("half an ans", finish_reason=reason))(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, "--json", prompts=["one", "two", "three"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["dropped"] == {"truncated": [2, 3]}
    unknown = reason in (None, "", "new_reason")
    assert summary["notes"] == unknown * [
        f"2 replies have a missing or unknown finish_reason ({reason or 'null'}) and count as truncated, "
        "because they may be incomplete"
    ]
    assert completions(tmp_path) == ["ONE"]


COMPLETE = ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "FinishReason.STOP"]


@pytest.mark.parametrize("reason", COMPLETE)
def test_a_finish_reason_that_is_a_stop_in_another_api(reason: str, tmp_path: Path) -> None:
    with serving(says("fine", finish_reason=reason)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
    assert [row["source"]["finish_reason"] for row in lines(tmp_path / "out.jsonl")] == [reason]


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.case(14)
@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ([THOUGHT, {"type": "text", "text": "fine"}], "hm", "fine"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fine"}], "hm", "fine"),
        ([{"type": "text", "text": "fi"}, {"type": "output_text", "text": "ne\n"}], "", "fine\n"),
        (["fi", "ne"], "", "fine"),
        ({"type": "text", "text": "fine"}, "", "fine"),
    ],
)
def test_content_that_is_a_list_of_parts(content: Any, reasoning: str, text: str, tmp_path: Path) -> None:
    with serving(says(content)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
        assert completions(tmp_path) == [text]
        assert collect(endpoint, tmp_path, "--keep-thinking", prompts=["one"]) == 0
        assert len(endpoint.asked) == 1
    assert completions(tmp_path) == [f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        ([{"type": "text", "text": None}], "type 'text'"),
        ([7], "int 7"),
        (1, "int 1"),
    ],
)
def test_content_that_is_not_text_is_refused_at_once(
    content: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(says(content)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 1
    assert "no completion for rows 1 (the content of the completion is not text: it has " in (
        said := capsys.readouterr().err
    )
    assert named in said
    assert len(endpoint.asked) == 1


@pytest.mark.case(15)
@pytest.mark.parametrize(
    "text", ["HTML has no </think> tag.", "Write\n</think>\nand answer.", "hm\n</think>\n\nA text."]
)
def test_an_end_of_thinking_in_a_text_cuts_only_if_thinking_was_asked_for(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = text.partition("</think>")[2].lstrip()
    with serving(says(text)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
        assert completions(tmp_path) == [text]
        assert (
            "note: 1 replies contain </think> without <think> and are kept whole" in capsys.readouterr().out
        )
        assert collect(endpoint, tmp_path, "--thinking", prompts=["one"]) == 0
        assert completions(tmp_path) == [after]
        assert len(endpoint.asked) == 1
        assert "note" not in capsys.readouterr().out
        for body, cut in (
            ({"chat_template_kwargs": {"enable_thinking": True}}, True),
            ({"chat_template_kwargs": {"enable_thinking": False}}, False),
            ({"thinking": {"type": "enabled", "budget_tokens": 9}}, True),
            ({"thinking": {"type": "disabled"}}, False),
            ({"reasoning": {"effort": "high"}}, True),
            ({"reasoning_effort": "none"}, False),
        ):
            flags = ["--extra-body", json.dumps(body)]
            assert collect(endpoint, tmp_path, *flags, prompts=["one"]) == 0
            assert completions(tmp_path) == [after if cut else text]
        endpoint.reply = says(text, reasoning_content="thought")
        flags = ["--thinking", "--temperature", "0.5"]
        assert collect(endpoint, tmp_path, *flags, prompts=["one"]) == 0
        assert completions(tmp_path) == [text], "the server has separated the thoughts"


@pytest.mark.case(16)
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (429, {"message": "You exceeded your current quota.", "code": "insufficient_quota"}),
        (200, {"message": "Payment required.", "code": "402"}),
        (429, {"message": "You exceeded your current quota.", "type": "insufficient_quota", "code": None}),
        (429, {"message": "Your account has insufficient balance.", "code": "1113"}),
        (429, {"message": "Suspended.", "type": "exceeded_current_quota_error"}),
        (400, {"message": "Limit reached.", "code": "billing_hard_limit_reached"}),
        (402, {"message": "Insufficient Balance"}),
        (200, {"message": "Insufficient credits", "code": 402}),
    ],
)
def test_an_exhausted_quota_stops_the_run_at_once_and_keeps_progress(
    number: int, error: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        (echo if len(endpoint.asked) <= 2 else status(number, {"error": error}))(endpoint, handler, body)

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, "--concurrency", "1") == 2
        said = capsys.readouterr().err
        assert f"{endpoint.url}: status {number}: {error['message']}" in said
        assert "Replies received so far are kept" in said
        assert len(endpoint.asked) == 3
        endpoint.reply = echo
        assert collect(endpoint, tmp_path) == 0
    assert completions(tmp_path) == [prompt.upper() for prompt in PROMPTS]
    assert endpoint.counts == {"one": 1, "two": 1, "three": 2, "four": 1, "five": 1}


def test_a_limit_per_minute_is_retried_although_it_names_a_quota(tmp_path: Path) -> None:
    error = {"message": "You exceeded your current quota, check your plan and billing details", "code": 429}
    limit = status(429, {"error": error | {"status": "RESOURCE_EXHAUSTED"}}, Retry_After="0")
    with serving(first(limit)) as endpoint:
        assert collect(endpoint, tmp_path) == 0
    assert endpoint.counts == dict.fromkeys(PROMPTS, 2)


def test_a_pause_that_is_too_long_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(status(429, {"error": "daily limit"}, Retry_After="7200")) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 1
    assert "status 429: daily limit (Retry-After: 7200)" in capsys.readouterr().err
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("said", "stripped"),
    [
        ("<think>\nhm\n</think>\n\nA  text.\n", "A  text.\n"),
        ("A text. <think>no</think>", "A text. <think>no</think>"),
        (" A text. ", " A text. "),
    ],
)
def test_thinking_before_a_completion_is_cut_off(said: str, stripped: str, tmp_path: Path) -> None:
    with serving(says(said)) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
        assert completions(tmp_path) == [stripped]
        assert collect(endpoint, tmp_path, "--keep-thinking", prompts=["one"]) == 0
        assert completions(tmp_path) == [said]
        assert len(endpoint.asked) == 1, "the cache holds the complete reply"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_in_a_separate_field(name: str, tmp_path: Path) -> None:
    with serving(says("A text.", **{name: "hm\n"})) as endpoint:
        assert collect(endpoint, tmp_path, prompts=["one"]) == 0
        assert completions(tmp_path) == ["A text."]
        assert collect(endpoint, tmp_path, "--keep-thinking", prompts=["one"]) == 0
    assert completions(tmp_path) == ["<think>\nhm\n</think>\n\nA text."]


def test_replies_of_another_model_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        send(handler, completion(prompt, model="expert" if prompt == "one" else "cheaper"))

    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count("4 replies name a model other than 'expert': cheaper") == 1
    assert [row["source"]["model"] for row in lines(tmp_path / "out.jsonl")] == ["expert"] + ["cheaper"] * 4


# Rewards


REWARD = """
def length(completions, wanted):
    return [None if "?" in c else float(len(c)) for c in completions]

def by_message(completions, prompts):
    assert prompts[0][-1]["role"] == "user"
    return [float(len(c[0]["content"])) for c in completions]

def ids(completions, completion_ids):
    return [0.0 for _ in completions]
"""


def test_best_of_n_and_min_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"a": ["bb", "dddd", "cccc", "?????"], "b": ["x", "y", "z", "w"], "c": ["?"] * 4}

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        send(handler, completion(said[body["messages"][-1]["content"]][body["seed"]]))

    (tmp_path / "task.py").write_text(REWARD)

    def kept(*flags: str) -> list[tuple[str, float | None]]:
        command = ["--num-samples", "4", "--seed", "0", "--rewards", f"{tmp_path}/task.py:length", *flags]
        assert collect(endpoint, tmp_path, *command, prompts=["a", "b", "c"], wanted=1) == 0
        return [(row["completion"], row["source"]["reward"]) for row in lines(tmp_path / "out.jsonl")]

    with serving(reply) as endpoint:
        assert kept("--best-of-n") == [("dddd", 4.0), ("x", 1.0)]
        told = capsys.readouterr().out
        assert "dropped: 5 completions, without a reward: rows 1, 3" in told
        assert "dropped: 5 completions, not the best of their prompt: rows 1, 2" in told
        assert kept("--min-reward", "2") == [("bb", 2.0), ("dddd", 4.0), ("cccc", 4.0)]
        assert "dropped: 4 completions, reward below 2: rows 2" in capsys.readouterr().out
        assert kept("--min-reward", "2", "--best-of-n") == [("dddd", 4.0)]
        assert len(endpoint.asked) == 12


def test_min_reward_and_the_best_ignore_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ "a" has the reward 0.9999999999999999 and "b" 1.0: the first is kept, as among equal rewards."""

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        send(handler, completion("ab"[body["seed"]]))

    (tmp_path / "task.py").write_text(
        "def f(completions):\n    return [.6 + .3 + .1 if c == 'a' else 1.0 for c in completions]\n"
    )
    command = ["--num-samples", "2", "--seed", "0", "--rewards", f"{tmp_path}/task.py:f", "--min-reward", "1"]
    with serving(reply) as endpoint:
        assert collect(endpoint, tmp_path, *command, prompts=["p"]) == 0
        assert completions(tmp_path) == ["a", "b"]
        assert collect(endpoint, tmp_path, *command, "--best-of-n", prompts=["p"]) == 0
        assert completions(tmp_path) == ["a"]


def test_rewards_get_chats_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(REWARD)
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bbb")]
    with serving() as endpoint:
        flags = ["--rewards", f"{tmp_path}/task.py:by_message", "--min-reward", "3"]
        assert collect(endpoint, tmp_path, *flags, prompts=prompts) == 0
    assert completions(tmp_path) == ["BBB"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("length", "needs a column 'wanted', but no row has a value for it"),
        ("ids", "needs completion_ids"),
        ("nothing", "has no function 'nothing'"),
        ("by_message", "fails on rows 1, 2"),
    ],
)
def test_an_unusable_reward_is_reported_before_any_request(
    reward: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.py").write_text(REWARD)
    with serving() as endpoint:
        assert collect(endpoint, tmp_path, "--rewards", f"{tmp_path}/task.py:{reward}", "--best-of-n") == 2
    assert message in capsys.readouterr().err
    assert not endpoint.asked


# Results


def test_json_counts_tokens_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(first(status(500))) as endpoint:
        flags = ["--price-in", "1000000", "--price-out", "500000", "--json"]
        assert collect(endpoint, tmp_path, *flags) == 0
        assert json.loads(capsys.readouterr().out) == {
            "output": str(tmp_path / "out.jsonl"),
            "model": "expert",
            "prompts": 5,
            "demonstrations": 5,
            "asked": 5,
            "prompt_tokens": 15,
            "completion_tokens": 10,
            "cost": 20.0,
            "dropped": {},
            "failed": {},
            "notes": [],
        }
        assert collect(endpoint, tmp_path, *flags) == 0
        assert json.loads(capsys.readouterr().out)["cost"] == 0


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from uniapl.collect.progress import Progress

    monkeypatch.setattr("time.monotonic", lambda: 110.0)
    subject = Progress(total=40, price_in=1.0, started=100.0, done=10, failed=2)
    subject.prompt_tokens, subject.completion_tokens = 2_000_000, 500
    assert subject.line() == "10/40 requests, 50 tokens/s, cost 2.0000, 2 failed, 0:00:30 left"


def test_the_collected_file_is_trained_on(tmp_path: Path) -> None:
    rows = [f"say {letter}." for letter in "abcdef"]
    model = save_model(tmp_path / "model")
    with serving(says("aaa", "bbb", "ccc")) as endpoint:
        assert collect(endpoint, tmp_path, prompts=rows) == 0
    written = lines(tmp_path / "out.jsonl")
    assert cli.run(["check", str(write_recipe(tmp_path, model, written))]) == 0
    values = recipe(model, tmp_path / "run2", max_steps=1, data={"path": str(tmp_path / "out.jsonl")})
    uniapl.train(values | {"rewards": {"functions": ["lowercase"]}})
    (step,) = lines(tmp_path / "run2" / "metrics.jsonl")
    assert step["loss/sft"] > 0
    assert step["skipped"] == 0


# Invalid input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Two."}, "row 2 has no 'prompt' and no 'messages'"),
        ({"prompt": "  "}, "row 2: the prompt is empty"),
        ({"prompt": [{"role": "user"}]}, "row 2: 'prompt' must be"),
        ({"messages": "Two."}, "row 2: 'messages' must be"),
        ({"prompt": "Two.", "completion": "x"}, "row 2 already has a 'completion'"),
        ({"prompt": "Two.", "source": "web"}, "row 2 already has a 'source'"),
        ({"prompt": "Two.", "chosen": "x"}, "row 2 already has a 'chosen'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "already ends with a completion"),
        (2, "row 2 is not a mapping"),
    ],
)
def test_an_unusable_row_is_named(
    row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "One."}}\n{json.dumps(row)}\n')
    with serving() as endpoint:
        assert cli.run(["collect", str(path), "-o", str(tmp_path / "o.jsonl"), "--url", endpoint.url]) == 2
    assert message in (said := capsys.readouterr().err)
    assert str(path) in said
    assert not endpoint.asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "out.json"], "--output 'out.json' must end in .jsonl"),
        (["--url", "localhost:8000/v1"], "expected for example http://host:8000/v1"),
        (["--url", "http://me:hidden@host:x/v1"], "invalid URL 'host:x/v1'"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--timeout", "0"], "--timeout must be more than 0"),
        (["--best-of-n"], "--min-reward and --best-of-n need --rewards"),
        (["--num-samples", "2", "--temperature", "0"], "gives equal completions"),
    ],
)
def test_invalid_options(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("http://127.0.0.1:1/v1", tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "hidden" not in said


@pytest.mark.parametrize("body", ['{"n": 2}', "[]", "{", '{"stream": true}'])
def test_an_invalid_extra_body(body: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        collect("http://127.0.0.1:1/v1", tmp_path, "--extra-body", body)
    assert end.value.code == 2


def test_existing_files_of_others_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("another program's\n")
    with serving() as endpoint:
        assert collect(endpoint, tmp_path) == 2
        assert "exists without its cache" in capsys.readouterr().err
        assert output.read_text() == "another program's\n"
        path = write(tmp_path / "prompts.jsonl", PROMPTS)
        assert cli.run(["collect", str(path), "-o", str(path)]) == 2
        assert "--output is the file of the prompts" in capsys.readouterr().err
        (tmp_path / "out.jsonl.cache.jsonl").write_text('{"key": "x"}\n')
        assert collect(endpoint, tmp_path) == 2
        assert "line 1 is not a reply" in capsys.readouterr().err
        assert not endpoint.asked


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("uniapl.collect.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    from uniapl.cli.collect import collect as run_collecting

    path = write(tmp_path / "prompts.jsonl", PROMPTS)
    with pytest.raises(uniapl.UsageError, match=r"pip install 'uniapl\[collect\]'"):
        run_collecting([str(path), "-o", str(tmp_path / "out.jsonl")])
