"""Files and datasets whose values arrive as they are written, and errors that name the file and the row."""

import datetime
import decimal
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import uniapl
from support.runs import lines, recipe, train
from support.tiny import make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.reading import Rows, named_source, number_rows, read_rows
from uniapl.data.rows import tokenize_rows
from uniapl.errors import UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def read(path: Path, **config: Any) -> list[Any]:
    return [row for _, row in read_rows(DataConfig(path=str(path), **config))]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.case(11)
def test_cells_of_a_csv_file_are_the_text_in_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.csv",
        "prompt,answer,other\n"
        '"zip?","02134",007\n'
        "digits?,123456789012345678901234567890,1e3\n"
        "words?,None,nan\n"
        'true?,"TRUE",\n'
        "space?, 1.50 ,2024-01-02\n",
    )
    assert read(file) == [
        {"prompt": "zip?", "answer": "02134", "other": "007"},
        {"prompt": "digits?", "answer": "123456789012345678901234567890", "other": "1e3"},
        {"prompt": "words?", "answer": "None", "other": "nan"},
        {"prompt": "true?", "answer": "TRUE", "other": None},
        {"prompt": "space?", "answer": " 1.50 ", "other": "2024-01-02"},
    ]


@pytest.mark.case(11)
def test_reward_functions_get_the_text_of_a_csv_file(tmp_path: Path, model_dir: Path) -> None:
    file = write(tmp_path / "x.csv", "prompt,completion,answer\na,b,02134\nc,d,007\ne,f,1e3\ng,h,\n")
    seen: set[str] = set()

    def watch(completions: list[str], answer: list[str]) -> list[float]:
        seen.update(answer)
        return [float(len(text)) for text in completions]

    values = recipe(model_dir, tmp_path / "run", max_steps=2, data={"path": str(file)})
    train(values, train_dataset=None, reward_functions=[watch])
    assert seen == {"02134", "007", "1e3"}, "the row without an answer is not scored"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b'\xef\xbb\xbfprompt,answer\r\n"a, ""b""\r\nc",1\r\n\r\nd,2\r\n'),
        ("x.csv", b'prompt;answer\n"a, ""b""\r\nc";1\nd;2\n'),
        ("x.csv", b'"prompt"\t"answer"\n"a, ""b""\r\nc"\t1\nd\t2\n'),
        ("x.tsv", b'prompt\tanswer\n"a, ""b""\r\nc"\t1\nd\t2\n'),
        ("x.csv", b' prompt , answer\r"a, ""b""\r\nc",1\rd,2\r'),
        ("x.csv.gz", gzip.compress(b'prompt,answer\n"a, ""b""\r\nc",1\nd,2\n', mtime=0)),
    ],
    ids=["bom and crlf", "semicolons", "tabs", "tsv", "cr and spaces in the header", "gzip"],
)
def test_forms_of_csv(name: str, content: bytes, tmp_path: Path) -> None:
    expected = [{"prompt": 'a, "b"\r\nc', "answer": "1"}, {"prompt": "d", "answer": "2"}]
    assert read(write(tmp_path / name, content)) == expected


def test_long_cells_and_the_index_of_pandas(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert read(write(tmp_path / "x.csv", f",prompt\n0,{long}\n")) == [{"Unnamed: 0": "0", "prompt": long}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "prompt,answer\na,1\nb,2,3\n", "x.csv: line 3: the row has 3 cells and the header 2"),
        ("x.csv", 'prompt,answer\n"a\nb",1\nc\n', "x.csv: line 4: the row has 1 cells and the header 2"),
        ("x.csv", "prompt,answer,answer\na,1,2\n", "x.csv: line 1: duplicate column 'answer'"),
        ("x.csv", 'prompt,answer\n"a" b,1\n', "x.csv: line 2: invalid CSV"),
        ("x.csv", 'prompt,answer\n"a,1\n', "x.csv: line 2: invalid CSV"),
        ("x.csv", "prompt,answer\n", "x.csv: the data has no rows"),
        ("x.jsonl", '{"a": 1}\n{"a": NaN}\n', r"x.jsonl: line 2: invalid JSON \(NaN is not JSON; write null"),
        ("x.jsonl", '{"a": [-Infinity]}\n', r"line 1: invalid JSON \(-Infinity is not JSON"),
        ("x.jsonl", '{"a": 1e999}\n', r"line 1: invalid JSON \(the number 1e999 is too large"),
        ("x.jsonl", '{"prompt": 1, "prompt": 2}\n', r"line 1: invalid JSON \(duplicate key 'prompt'\)"),
        ("x.json", '[{"a": 1}, {"b": {"a": 1, "a": 2}}]', r"row 2: invalid JSON \(duplicate key 'a'\)"),
        ("x.json", '[{"a": 1},\n {"a": NaN}]', r"row 2: invalid JSON \(NaN is not JSON"),
        ("x.json", '[{"a": 1},\n {"a" 2}]', r"row 2: invalid JSON \(.*line 2 column 7"),
        ("x.json", '[{"a": 1} {"a": 2}]', r"row 1: invalid JSON \(Expecting ',' delimiter"),
        ("x.json", '[{"a": 1}] []', r"row 1: invalid JSON \(Extra data"),
        ("x.json", '[{"a": 1},]', r"row 2: invalid JSON"),
        ("x.json", "[]", "x.json: the data has no rows"),
        ("x.json", '{"a": 1}\n{"a": }\n', "x.json: line 2: invalid JSON"),
        ("x.json", '{"rows": [\n{"a": 1}]}', "the file is one object"),
        ("x.jsonl.gz", b"nonsense", "x.jsonl.gz: invalid gzip data"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "x.jsonl.gz: invalid gzip data"),
        ("x.jsonl.zst", b"", r"must end in .*\.jsonl\.gz"),
    ],
)
def test_invalid_files_are_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(write(tmp_path / name, content))


def test_json_values_are_exact(tmp_path: Path) -> None:
    row = {"n": 123456789012345678901234567890, "f": 0.1, "date": "2024-01-02T03:04:05Z", "zip": "02134"}
    rows = [row, {"n": "mixed", "f": 1, "date": None, "zip": {"only": "here"}}]
    text = "".join(json.dumps(each) + "\r\n" for each in rows)
    for name, content in {
        "a.jsonl": text.encode(),
        "b.json": b"\xef\xbb\xbf " + json.dumps(rows, indent=1).encode(),
        "c.json": text.encode(),
        "d.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + text.encode()),
        "e.json.gz": gzip.compress(json.dumps(rows).encode()),
        "f.json.gz": gzip.compress(text.encode()),
    }.items():
        found = read(write(tmp_path / name, content))
        assert found == rows, name
        assert type(found[1]["f"]) is int
    assert read(write(tmp_path / "one.json", '{"prompt": "a"}\n')) == [{"prompt": "a"}]


def test_parquet_values_keep_their_types(tmp_path: Path, model_dir: Path) -> None:
    answers = {
        "date": [datetime.date(2024, 1, 2), None],
        "time": [datetime.datetime(2024, 1, 2, 3, 4, 5), None],
        "price": [decimal.Decimal("1.50"), None],
        "count": [2**62 + 1, None],
        "struct": [{"a": 1, "b": None}, {"a": None, "b": 2}],
    }
    turns = [{"role": "user", "content": "a", "name": None}]
    columns = {"prompt": [turns, turns], "completion": ["b", "c"], **answers}
    path = tmp_path / "year=2024" / "x.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = read(path)
    assert {name: [row[name] for row in found] for name in answers} == answers
    assert found[0].keys() == columns.keys(), "the directory adds no column"
    assert found[0]["prompt"] == [{"role": "user", "content": "a"}]
    [renamed, _] = read(path, columns={"struct": "tools"})
    assert renamed["struct"] == {"a": 1}
    seen: dict[str, Any] = {}

    def watch(completions: list[str], date: Any, time: Any, price: Any, count: Any) -> list[float]:
        seen.update(date=date[0], time=time[0], price=price[0], count=count[0])
        return [float(len(str(text))) for text in completions]

    texts = {"prompt": ["a", "b"], "completion": ["b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table({**texts, **answers}), path)
    values = recipe(model_dir, tmp_path / "run", max_steps=1, data={"path": str(path)})
    train(values, train_dataset=None, reward_functions=[watch])
    assert seen == {name: answers[name][0] for name in seen}
    duplicate = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(duplicate, path)
    with pytest.raises(UsageError, match=r"x\.parquet: duplicate column 'prompt'"):
        read(path)


def test_several_files_and_patterns(tmp_path: Path) -> None:
    first = write(tmp_path / "b" / "x.jsonl", '{"prompt": "1"}\n\n{"prompt": "2"}\n')
    second = write(tmp_path / "a.csv", "prompt\n3\n4\n")
    rows = read_rows(DataConfig(path=(str(first), str(second))))
    assert [(number, row["prompt"]) for number, row in rows] == [(1, "1"), (3, "2"), (4, "3"), (5, "4")]
    assert [rows.place(number) for number in (1, 3, 4, 5)] == [
        (str(first), 1),
        (str(first), 3),
        (str(second), 1),
        (str(second), 2),
    ]
    assert rows.notes == [f"rows of 2 files are numbered in one sequence: {first} from 1, {second} from 4"]
    assert read(tmp_path / "**" / "*.*") == [{"prompt": n} for n in "3412"], "sorted by name"
    assert read_rows(DataConfig(path=str(first))).notes == []
    with pytest.raises(UsageError, match=r"data.path: no file matches '.*\*\.parquet'"):
        read(tmp_path / "*.parquet")
    with pytest.raises(UsageError, match=r"data.path: '.*a\.csv' occurs more than once"):
        read_rows(DataConfig(path=(str(second), str(tmp_path / "*.csv"))))
    with pytest.raises(UsageError, match=r"file not found: 'nowhere' \(a list can only contain files\)"):
        read_rows(DataConfig(path=(str(second), "nowhere")))
    bad = write(tmp_path / "bad.jsonl", '\n{"question": 1}\n')
    several = read_rows(DataConfig(path=(str(first), str(bad))))
    with pytest.raises(UsageError, match=r"bad\.jsonl: row 2: no 'prompt'"), named_source(several):
        tokenize_rows(several, make_tokenizer(), DataConfig())


def test_a_pattern_s_characters_may_be_a_file_s(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x[1].jsonl", '{"prompt": "a"}')) == [{"prompt": "a"}]


def test_a_run_on_several_files(tmp_path: Path, model_dir: Path) -> None:
    files = [
        str(write(tmp_path / f"{name}.jsonl", '{"prompt": "say a.", "completion": "aaa", "letter": "a"}\n'))
        for name in "ab"
    ]
    values = recipe(model_dir, tmp_path / "run", max_steps=1, data={"path": files})
    train(values, train_dataset=None)
    assert {line["row"] for line in lines(tmp_path / "run" / "completions.jsonl")} == {1, 2}
    assert "demonstrations and prompts: a.jsonl, b.jsonl" in (tmp_path / "run/final/README.md").read_text()


@pytest.mark.case(18)
def test_arguments_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: str | None, **options: Any) -> datasets.Dataset:
        asked.append((names, options))
        return datasets.Dataset.from_list([{"question": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(path="openai/gsm8k", name="main", revision="v1", split="test")
    assert list(read_rows(config)) == [(1, {"question": "a"})]
    read_rows(DataConfig(path="a/b"))
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test", "revision": "v1"}),
        (("a/b", None), {"split": "train", "revision": None}),
    ]


def test_a_directory_in_the_form_of_a_hub_dataset(tmp_path: Path) -> None:
    configs = [{"config_name": name, "data_files": f"{name}/*.csv"} for name in ("main", "socratic")]
    write(tmp_path / "README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")
    write(tmp_path / "main" / "train.csv", "prompt,answer\nNone,02134\n")
    write(tmp_path / "socratic" / "train.csv", "prompt,answer\nb,1e3\n")
    assert read(tmp_path, name="main") == [{"prompt": "None", "answer": "02134"}]
    assert read(tmp_path, name="socratic") == [{"prompt": "b", "answer": "1e3"}]
    with pytest.raises(UsageError, match=r"cannot load.*'main', 'socratic'.*; set data.name to one of them"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"'socratic'\]; set data.name to one of them"):
        read(tmp_path, name="algebra")
    with pytest.raises(UsageError, match=r"'train'\]; set data.split to one of them"):
        read(tmp_path, name="main", split="test")


def test_json_of_a_dataset_is_not_converted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 2**70, "date": "2024-01-02T00:00:00Z", "s": {"a": 1}}]
    rows += [{"prompt": "b", "n": 1, "date": "2024-01-03T00:00:00Z", "s": {"b": 1}}]
    write(tmp_path / "data" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path) == rows
    rows = [{"prompt": "a", "n": 2**70 + n} for n in range(10)]
    write(tmp_path / "data" / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path, split="test[2:5]") == rows[2:5]
    assert read(tmp_path, split="test[-20%:]") == rows[8:]


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}])
    dataset.set_format("numpy")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "one") == read(tmp_path / "several") == dataset.with_format(None).to_list()
    assert type(read(tmp_path / "one")[0]["n"]) is int
    assert read(tmp_path / "several", split="test") == [{"prompt": "b", "n": None}]
    with pytest.raises(UsageError, match=r"cannot load .*several.*dev"):
        read(tmp_path / "several", split="dev")


def test_a_dataset_from_python_is_plain_python() -> None:
    tools = [
        {"name": "f", "parameters": {"a": 1, "b": None}},
        {"name": "g", "parameters": {"a": None, "b": 2}},
    ]
    dataset = datasets.Dataset.from_list([{"prompt": "a", "n": 1, "tools": tools, "kwargs": tools}])
    dataset.set_format("numpy")
    [(number, row)] = number_rows(dataset, DataConfig())
    assert (number, type(row["n"]), row["kwargs"]) == (1, int, tools)
    assert [tool["parameters"] for tool in row["tools"]] == [{"a": 1}, {"b": 2}]


def test_paths_that_are_no_hub_id(tmp_path: Path) -> None:
    for path in ("./rows", str(tmp_path / "rows"), "a/b/c", "a/b.csv.gz"):
        with pytest.raises(UsageError, match=f"data.path: file not found: '{path}'"):
            read_rows(DataConfig(path=path))
    assert issubclass(uniapl.UsageError, UsageError)
    assert isinstance(read_rows(DataConfig(path=str(write(tmp_path / "x.csv", "prompt\na\n")))), Rows)
