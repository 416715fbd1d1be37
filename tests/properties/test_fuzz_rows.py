"""Data files of every kind, and reward functions that answer anything, end well or with one clear message."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st

from support.fuzzing import Said, assert_clear, json_values, say, scalars, small_recipe, texts, tries
from support.tiny import save_model

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)
REWARD = """
def listed(completions, answer):
    return [float(str(a) in str(c)) for c, a in zip(completions, answer)]

def fragile(completions, answer):
    return [len(c) / len(a) for c, a in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With two models, one of them for chats, and reward functions."""
    path = tmp_path_factory.mktemp("fuzz")
    save_model(path / "text")
    save_model(path / "chat", chat_template=TEMPLATE)
    (path / "reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        # It keeps a copy of every file that it reads.
        patch.setattr("datasets.config.HF_DATASETS_CACHE", path / "cache")
        yield path


roles = st.sampled_from(["user", "assistant", "system", "tool", "", "User"]) | scalars
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": roles, "content": texts | texts | json_values, "x": json_values}
    )
    | json_values,
    max_size=3,
)
good_texts = st.text("abc ,.", min_size=1, max_size=8)
good_chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": good_texts}),
    min_size=1,
    max_size=3,
)
answers = good_texts | st.tuples(
    st.fixed_dictionaries({"role": st.just("assistant"), "content": good_texts})
).map(list)
good_rows = st.fixed_dictionaries(
    {"prompt": good_texts | good_chats},
    optional={"completion": answers, "answer": good_texts | st.integers(0, 9)},
)
odd_columns = {
    "prompt": texts | messages | json_values,
    "completion": texts | messages | json_values,
    "messages": good_chats | messages | json_values,
    "chosen": answers | texts | messages | json_values,
    "rejected": answers | texts | messages | json_values,
    "answer": json_values,
    "instruction_id_list": json_values,
    "kwargs": json_values,
}
odd_rows = st.one_of(
    st.tuples(good_rows, st.sampled_from(list(odd_columns))).flatmap(
        lambda parts: odd_columns[parts[1]].map(lambda value: parts[0] | {parts[1]: value})
    ),
    st.fixed_dictionaries({}, optional=odd_columns),
    json_values,
)
rows = st.tuples(st.lists(good_rows, max_size=3), st.lists(odd_rows, max_size=2)).map(
    lambda both: [*both[0], *both[1]]
)
# What passes for a row: it gets further.
odd_contents = st.fixed_dictionaries(
    {"prompt": texts | good_chats},
    optional={"completion": texts | answers, "rejected": texts, "answer": json_values},
)


def run(
    verb: str, folder: Path, data: Path, model: str = "text", form: str = "text", reward: str = "listed"
) -> Said:
    recipe = small_recipe(folder / model, folder) | {"overwrite": True}
    recipe["data"] = {"path": str(data), "prompt_format": form}
    recipe["rewards"] = {"functions": [f"{folder / 'reward.py'}:{reward}", "lowercase"]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return say(verb, str(path))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def jsonl(some: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in some)


forms = st.sampled_from(["text", "chat"])
models = st.sampled_from(["chat", "chat", "chat", "text"])
rewards = st.sampled_from(["listed", "fragile"])
GOOD_ROW = {"prompt": "a", "completion": "b", "answer": "c"}
NOT_OF_ROWS = ("rewards", "reward function", "method 'uniapl'")
"""What a message may name instead of the file: what does not fit is a reward or the method."""


@tries(80)
@given(some=rows, model=models, form=forms, reward=rewards, suffix=st.sampled_from(["jsonl", "json"]))
def test_odd_rows(some: list[Any], model: str, form: str, reward: str, suffix: str, folder: Path) -> None:
    data = folder / f"rows.{suffix}"
    some = [GOOD_ROW, *some]
    data.write_bytes(jsonl(some) if suffix == "jsonl" else as_json(some))
    assert_clear(run("check", folder, data, model, form, reward), str(data), *NOT_OF_ROWS)


@tries(12)
@given(some=st.lists(odd_contents, max_size=3) | rows, model=models, form=forms, reward=rewards)
def test_odd_rows_are_trained_on(some: list[Any], model: str, form: str, reward: str, folder: Path) -> None:
    data = folder / "rows.jsonl"
    data.write_bytes(jsonl([*some, GOOD_ROW]))
    assert_clear(run("train", folder, data, model, form, reward), str(data), *NOT_OF_ROWS)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that somebody cut off, wrote into, or saved in another encoding."""
    place = draw(st.integers(0, len(whole)))
    inserted = draw(
        st.binary(max_size=4) | st.sampled_from([b"\n\n", b"\r\n", b"\xff", b"\0", b"[" * 9000, b"9" * 5000])
    )
    encoded = whole.decode().encode(draw(st.sampled_from(["utf-8-sig", "utf-16", "cp037"])))
    return draw(
        st.sampled_from(
            [
                whole[:place],
                whole[:place] + inserted + whole[place:],
                encoded,
                whole.replace(b"\n", b"\r\n"),
                inserted,
            ]
        )
    )


WHOLE = jsonl([GOOD_ROW, {"prompt": "é", "completion": "ü", "answer": ["👧"]}])
jsonl_files = damaged(WHOLE) | st.binary(max_size=40)
json_files = damaged(b"[" + b",".join(WHOLE.split(b"\n")[:2]) + b"]") | st.binary(max_size=40)
csv_files = damaged(b'prompt,completion,answer\na,b,c\n"d ""e""","f\n",\n') | st.binary(max_size=40)


@tries(40)
@given(
    file=st.one_of(
        st.tuples(st.just("jsonl"), jsonl_files),
        st.tuples(st.just("json"), json_files),
        st.tuples(st.just("csv"), csv_files),
    )
)
def test_damaged_files(file: tuple[str, bytes], folder: Path) -> None:
    suffix, content = file
    data = folder / f"damaged.{suffix}"
    data.write_bytes(content)
    assert_clear(run("check", folder, data), str(data), *NOT_OF_ROWS)


column_names = st.sampled_from(["prompt", "completion", "messages", "chosen", "rejected", "answer"]) | texts
cells = texts | scalars
csv_tables = st.lists(
    st.dictionaries(column_names, cells, max_size=3).map(lambda row: GOOD_ROW | row), min_size=1, max_size=3
)
types_ = st.sampled_from(
    [st.integers(-9, 9), st.booleans(), st.floats(), st.dates(), st.binary(max_size=4), good_chats, texts]
)
parquet_columns = st.dictionaries(
    column_names, types_.flatmap(lambda of: st.lists(of | st.none(), min_size=2, max_size=2)), max_size=3
)


@tries(12)
@given(table=csv_tables)
def test_odd_tables_as_csv(table: list[dict[str, Any]], folder: Path) -> None:
    data = folder / "table.csv"
    with data.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in table for name in row}))
        writer.writeheader()
        writer.writerows(table)
    assert_clear(run("check", folder, data), str(data), *NOT_OF_ROWS)


@tries(12)
@given(columns=parquet_columns)
def test_odd_tables_as_parquet(columns: dict[str, list[Any]], folder: Path) -> None:
    data = folder / "table.parquet"
    whole = {name: [value] * 2 for name, value in GOOD_ROW.items()} | columns
    try:
        pandas.DataFrame(whole).to_parquet(data)
    except (ValueError, OverflowError):  # what no such file can hold: lone surrogates
        reject()
    assert_clear(run("check", folder, data, "chat"), str(data), *NOT_OF_ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"3\n", "row 1: expected a mapping of columns to values, got 3"),
        ("x.json", b"[null]", "row 1: expected a mapping of columns to values, got None"),
        ("x.jsonl", b'{"prompt": "\\ud800"}', "row 1: tokenisation failed"),
        ("x.jsonl", b"\n" + b"[" * 9000, "line 2: invalid JSON"),
        ("x.json", b"[" * 9000, ": invalid JSON"),
        ("x.jsonl", b"9" * 5000, "line 1: invalid JSON"),
        ("x.json", b"9" * 5000, ": invalid JSON"),
        ("x.jsonl", b'{"' + b"x" * 10_000 + b'": 1}', "row 1: no 'prompt' and no 'messages'"),
        ("x.csv", b"prompt\na\nb,c,d\n", "line 3: the row has 3 cells and the header 1"),
    ],
)
def test_files_that_were_not_answered_clearly(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    said = run("check", folder, folder / name)
    assert_clear(said, str(folder / name))
    assert message in said.err
    assert len(said.err) < 1000


@pytest.mark.parametrize(
    "name", ["folder.jsonl", "a\0b.jsonl", "x" * 300 + ".jsonl", "x" * 300 + ".bin", "nowhere.csv"]
)
def test_data_that_are_no_file(name: str, folder: Path) -> None:
    (folder / "folder.jsonl").mkdir(exist_ok=True)
    said = run("check", folder, folder / name)
    assert said.code == 2
    assert_clear(said, "data.path")


def test_data_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    data = folder / "closed.jsonl"
    data.write_text("{}")
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (refuse if path == data else original)(path))
    said = run("check", folder, data)
    assert_clear(said, f"data.path: cannot read '{data}': [Errno 13] Permission denied")
    assert said.code == 2


SPLIT = "\ud800"
"""Half a surrogate pair: JSON can hold it, UTF-8 cannot."""


def test_prompts_that_no_file_can_hold_as_they_are(folder: Path) -> None:
    message = {"content": "a", "x": SPLIT}
    data = folder / "rows.jsonl"
    data.write_bytes(
        jsonl([{"prompt": [{"role": "user", **message}], "completion": "b" * 20, "answer": "c"}])
    )
    assert run("train", folder, data, "chat").code == 0
    lines = (folder / "run" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["prompt"] == [{"role": "user", **message}]
