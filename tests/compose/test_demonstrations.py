"""`uniapl compose --from-demonstrations`: every demonstration follows the instructions of its row."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.benchmark_data import DATA, rows
from support.runs import recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.compose.demonstrations import SUPPORTED, compose_demonstration
from uniapl.compose.prompts import all_conflicts
from uniapl.rewards.instructions import instruction_following

ALPACAEVAL = DATA / "alpacaeval" / "gpt4_0613_concise.jsonl"
STEM = "The bridge was built in 1,850, and it still carries people over the river"
ANSWERS = [
    *("Paris", "42", "Yes.", "No, never!", "1,234,567", "?", "🙂", "a", "...", '"', "''", "P.S.", "\t x \n"),
    *(
        '"Bonsoir"',
        '"Good evening" in French is "Bonsoir".',
        "He said, \"Wait, 'now'.\" She did.",
        "“Ja,” sagte er.",
    ),
    *(
        f"{STEM}.",
        f"{STEM}. {STEM}, too. Is it old? It is!",
        f"{STEM}.\n\n{STEM}.\nIt is old.\n",
        f"  {STEM}. ",
    ),
    *(
        "1. Apples, pears, and plums\n2. Cherries\n3. Figs, dates",
        "- one\n- two, three\n- four",
        "* a, b\n* c",
    ),
    *(
        "Title: The Old Bridge\n\nIt stood, and it stands.",
        "# Rivers\n\nThe Nile, the Amazon.",
        "<<Rivers>>\nNile, Po.",
    ),
    *("```python\nprint('A', 1)\n```", "Use `f(a, b)`, then https://Example.org/A,b now.", "x = f(a, b)"),
    *(
        "Die Brücke ist alt, aber sie trägt noch viele Menschen über den breiten Fluss.",
        "是的\uff0c这是一座很老的桥。",
    ),
    *(
        "Ça va, merci. C'est l'été à Paris.",
        "Пример, да. Это длинный ответ на вопрос.",
        "İstanbul, ẞ, ﬁne, Ⅷ",
    ),
    *("U.S. states, e.g. Ohio, got names.", "Dr. Smith arrived at 5 p.m. on Monday, etc.", "A\r\nB, C\r\n"),
    *(
        "[Your Name], [Date]: I am, [Title].",
        "one two three four five six seven eight nine ten" * 9,
        "a,b,c,,d,",
    ),
    *(
        "The cat (black, old, and tired) slept; it dreamt: fish, cream, or mice?",
        "Don't, won't, can't; it's fine.",
    ),
    *(
        "$5,000.00 | 3,5 % | (1, 2)",
        "* * *",
        "word\n" * 40,
        "Really?! Yes... No. OK!",
        "a\u00a0b,\u00a0c",
        "e\u0301t\u00e9, oui",
    ),
    *(
        "I hope this helps a little.",
        "No comma here at all, said the writer of many long texts.",
        "ALL CAPS, ALWAYS.",
    ),
]


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run(base: Path, output: Path, *flags: str) -> int:
    return cli.run(
        ["compose", str(base), "-o", str(output), "--from-demonstrations", "--overlap", "allow", *flags]
    )


def strict(row: dict[str, Any]) -> Any:
    return instruction_following(
        [row["prompt"]], [row["completion"]], [row["instruction_id_list"]], [row["kwargs"]]
    )[0]


@pytest.mark.parametrize("seed", range(4))
def test_every_demonstration_follows_its_instructions(seed: int, tmp_path: Path) -> None:
    prompts = ("Name a river, please.", "Explain the history of a bridge.\n\nTower Bridge", "???")
    base = [
        {"prompt": prompts[place % 3], "completion": answer}
        for place, answer in enumerate(ANSWERS)
        if answer.strip()
    ]
    out = tmp_path / "out.jsonl"
    flags = ("--seed", str(seed), "--per-prompt", "3", "--max-instructions", "1" if seed == 0 else "5")
    assert run(write(tmp_path / "base.jsonl", base), out, *flags) == 0
    written = rows(out)
    assert len({row["base_row"] for row in written}) >= len(base) - 2
    forbidden = all_conflicts()
    counts: Counter[str] = Counter()
    for row in written:
        assert strict(row) == 1.0, row
        kinds = row["instruction_id_list"]
        assert not any(one in forbidden[other] for one in kinds for other in kinds if one != other)
        assert "  " not in row["completion"] or "  " in base[row["base_row"] - 1]["completion"]
        counts.update(kinds)
    assert set(counts) == set(SUPPORTED)


@pytest.mark.real_data
@pytest.mark.skipif(not ALPACAEVAL.is_file(), reason=f"no {ALPACAEVAL}")
def test_every_demonstration_of_alpacaeval_follows_its_instructions(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(ALPACAEVAL, out, "--max-instructions", "4") == 0
    written = rows(out)
    assert len(written) == len(rows(ALPACAEVAL))
    assert {strict(row) for row in written} == {1.0}
    assert min(Counter(kind for row in written for kind in row["instruction_id_list"]).values()) > 80


def composed(kinds: list[str], answer: Any, prompt: str = "Name a river.", seed: int = 0) -> dict[str, Any]:
    row = compose_demonstration(prompt, answer, random.Random(seed), kinds, len(kinds), all_conflicts())
    assert row is not None
    return row


def each(kind: str, answer: str, prompt: str = "Name a river.") -> list[tuple[dict[str, Any], str]]:
    """(arguments, completion) of many draws."""
    made = [composed([kind], answer, prompt, seed) for seed in range(60)]
    return [(row["kwargs"][0], row["completion"]) for row in made]


def test_edits_are_combined() -> None:
    kinds = [
        "change_case:english_lowercase",
        "startend:end_checker",
        "detectable_format:title",
        "punctuation:no_comma",
    ]
    texts = set()
    for seed in range(40):
        row = composed(kinds, "The Nile, a long river, runs north.", "Name a river.", seed)
        if len(row["kwargs"]) == 4:
            phrase = next(given for given in row["kwargs"] if given)["end_phrase"].lower()
            assert row["completion"] == f"<<long river>>\n\nthe nile a long river runs north. {phrase}"
            texts.add(tuple(row["instruction_id_list"]))
    assert len(texts) > 3, "the instructions are in any order"


def test_the_number_of_words_is_above_the_edited_answer_s() -> None:
    ten = "one two three four five six seven eight nine ten"
    drawn = [given for given, _ in each("length_constraints:number_words", ten)]
    assert {given["num_words"] for given in drawn} == {11, 12, 13, 14, 15, 16}
    assert {given["relation"] for given in drawn} == {"less than"}
    assert {given["num_words"] for given, _ in each("length_constraints:number_words", "Yes")} == {2}
    both = [
        composed(["length_constraints:number_words", "startend:end_checker"], ten, seed=s) for s in range(40)
    ]
    for row in both:
        given = {key: value for one in row["kwargs"] for key, value in one.items()}
        if "num_words" in given and "end_phrase" in given:
            assert given["num_words"] > 10 + len(given["end_phrase"].split())


def test_the_number_of_sentences_is_the_checker_s() -> None:
    kind = "length_constraints:number_sentences"
    drawn = {
        (given["relation"], given["num_sentences"]) for given, _ in each(kind, "It is. Dr. Who is. Is it?")
    }
    assert drawn == {("at least", 3), ("less than", 4), ("less than", 5)}
    drawn = {(given["relation"], given["num_sentences"]) for given, _ in each(kind, "It is so.")}
    assert drawn == {("less than", 2), ("less than", 3)}
    for answer in ("1. It is.\n2. It was.", "Paris", "It rhymes\nat times."):
        assert compose_demonstration("Why?", answer, random.Random(0), [kind], 1, all_conflicts()) is None


def test_keywords_are_content_words_of_the_answer() -> None:
    answer = (
        "Which river is the longest? However, the Amazon carries more water; it's well-known, see nile.org."
    )
    drawn = [given["keywords"] for given, _ in each("keywords:existence", answer, "Name a river with water.")]
    assert {word for words in drawn for word in words} == {"longest", "Amazon", "carries"}
    assert {len(words) for words in drawn} == {1, 2}
    lower = [
        composed(["keywords:existence", "change_case:english_lowercase"], answer, seed=s) for s in range(20)
    ]
    words = {
        word
        for row in lower
        if len(row["kwargs"]) == 2
        for given in row["kwargs"]
        for word in given.get("keywords", [])
    }
    assert words == {"longest", "amazon", "carries"}
    none = compose_demonstration(
        "Why?", "It is the one.", random.Random(0), ["keywords:existence"], 1, all_conflicts()
    )
    assert none is None


@pytest.mark.parametrize(
    "answer",
    [
        *("Use `f(A, b)`.", "See https://Example.org/A,b now.", "```\nF(a, 'b')\n```"),
        *("def f(a, b):\n    return A + b", '{"a": 1, "B": [1, 2]}', "# Add, then print\nX = 1, 2"),
        *(
            "SELECT a, B FROM t WHERE x = 'Y'",
            "Write to Me@example.org, please.",
            "See www.Example.org, please.",
        ),
        *("It is \\(f(x, Y)\\), so it is.", "| A | B |\n|---|---|\n| 1 | x, y |", "<p>Hi, You</p>"),
    ],
)
def test_code_and_addresses_are_not_changed(answer: str) -> None:
    for seed in range(20):
        row = composed(list(SUPPORTED), answer, seed=seed)
        assert answer in row["completion"]
        assert not {
            *("punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"),
        } & set(row["instruction_id_list"])


def test_forms_of_rows(tmp_path: Path) -> None:
    """The completion has the row's form: text, or a message after the earlier turns."""
    turns = [
        {"role": "system", "content": "Be brief."},
        *({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, you."}),
        {"role": "user", "content": "Name two rivers."},
    ]
    answer = {"role": "assistant", "content": "The Nile, the Po."}
    base = [
        {"prompt": "Name two rivers.", "completion": " The Nile, the Po."},
        {"messages": [*turns, {"role": "assistant", "content": "The Nile, the Po."}]},
        {"prompt": turns, "completion": [{"role": "assistant", "content": "The Nile, the Po."}]},
        {"prompt": turns, "completion": "The Nile, the Po."},
        {"prompt": "Name two rivers.", "chosen": "The Nile, the Po.", "rejected": "No."},
        {"instruction": "Name two rivers.", "output": "The Nile, the Po."},
        {"chosen": [turns[3], answer], "rejected": [turns[3], turns[2]]},
        {
            "conversations": [
                {"from": "human", "value": "Name two rivers."},
                {"from": "gpt", "value": "The Nile, the Po."},
            ]
        },
    ]
    out = tmp_path / "out.jsonl"
    flags = ("--kinds", "punctuation:no_comma", "--seed", "3")
    for number, row in enumerate(base):
        assert run(write(tmp_path / f"{number}.jsonl", [row]), out, *flags) == 0
        (made,) = rows(out)
        is_chat = not isinstance(row.get("prompt", row.get("instruction")), str)
        text = "The Nile the Po."
        if is_chat:
            earlier = [] if {"conversations", "chosen"} & row.keys() else turns[:-1]
            assert made["prompt"][:-1] == earlier
            assert made["prompt"][-1]["content"].startswith("Name two rivers.")
            assert made["completion"] == [{"role": "assistant", "content": text}]
        else:
            assert made["prompt"].startswith("Name two rivers.")
            assert made["completion"] == (" " if number == 0 else "") + text
        assert made.keys() == {"prompt", "completion", "instruction_id_list", "kwargs", "base_row"}
        assert strict(made) == 1.0


def test_what_the_chat_template_gets_is_kept(tmp_path: Path) -> None:
    """Rows that differ in their tools only are no duplicates."""
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Po."}]
    given = [{"tools": [{"name": name}], "chat_template_kwargs": {"x": 1}} for name in "fg"]
    base = write(tmp_path / "base.jsonl", [{"messages": turns, **own, "source": "s"} for own in given])
    out = tmp_path / "out.jsonl"
    for flags in (("--from-demonstrations",), ()):
        command = ["compose", str(base), "-o", str(out), "--overlap", "allow", "--per-prompt", "30", *flags]
        assert cli.run([*command, "--kinds", "startend:quotation"]) == 0
        found = [{name: row[name] for name in given[0]} for row in rows(out)]
        assert {json.dumps(one) for one in found} == {json.dumps(one) for one in given}
        assert len(found) == 12, "two wordings and three ways to join, for each"
        assert all("source" not in row for row in rows(out))


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    base = [
        {"prompt": "Name a river.", "chosen": "The river, Po.", "rejected": "No, none."},
        *({"prompt": "Name a river."}, {"prompt": "Name a river.", "completion": "<think>So</think>Po."}),
        {"prompt": "Name a river.", "completion": "<think>So"},
        *(
            {"messages": [{"role": "user", "content": "Call f."}, call]},
            {"prompt": "Name one.", "completion": "是的"},
        ),
    ]
    out = tmp_path / "out.jsonl"
    kinds = ("--kinds", "change_case:english_lowercase")
    assert run(write(tmp_path / "base.jsonl", base), out, *kinds, "--per-prompt", "40") == 0
    (said := " ".join(capsys.readouterr().out.split()))
    assert (
        "note: 4 rows without a demonstration of plain text (no tool call, no <think>) were left out" in said
    )
    assert "note: 40 prompts were dropped: their demonstration can follow none of the instructions" in said
    assert "note: 1 rejected completions were left out: only demonstrations are edited" in said
    assert "34 duplicate prompts were dropped" in said, "two wordings, three ways to join"
    assert "6 prompts with demonstrations" in said
    assert {row["base_row"] for row in rows(out)} == {1}


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({}, (), "no prompt is left: 1 rows without a demonstration"),
        (
            {"completion": "是的"},
            ("--kinds", "change_case:english_lowercase"),
            "can follow none of the instructions",
        ),
        (
            {"completion": "A."},
            ("--kinds", "keywords:frequency"),
            "cannot edit answers for keywords:frequency; choose from",
        ),
        (
            {"completion": "A."},
            ("--kinds", "no_comma"),
            "--kinds: unknown no_comma; choose from startend:end_checker",
        ),
        (
            {
                "prompt": None,
                "messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}],
            },
            (),
            "row 1: 'messages' must end with a user message with text before its answer",
        ),
        ({"completion": 5}, (), "row 1: 'completion' must be a string"),
        ({"completion": "A.", "chosen": "B."}, (), "row 1: both 'completion' and 'chosen'"),
    ],
)
def test_errors(
    row: Any, flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "base.jsonl", [{"prompt": "Name a river.", **row}])
    assert run(base, tmp_path / "out.jsonl", *flags) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    if "cannot edit" in message:
        assert ", ".join(SUPPORTED) in said
    assert not (tmp_path / "out.jsonl").exists()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base.jsonl", [{"prompt": "Why?", "completion": answer} for answer in ANSWERS[16:30]]
    )
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run(base, tmp_path / name / "out.jsonl", "--seed", seed) == 0
    texts = [(tmp_path / name / "out.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_check_accepts_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [{"prompt": f"say {letter}.", "completion": f"{letter}, so it is."} for letter in "abcdef"]
    out = tmp_path / "train.jsonl"
    assert run(write(tmp_path / "base.jsonl", base), out, "--max-instructions", "2") == 0
    values = recipe(save_model(tmp_path / "model"), tmp_path / "run", data={"path": str(out)})
    values["rewards"] = {"functions": [{"name": "instruction_following", "args": {"criterion": "share"}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    capsys.readouterr()
    assert cli.run(["check", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert (checked["examples"], checked["with_demonstration"], checked["left_out"]) == (6, 6, {})
    assert checked["rewards"] == {"instruction_following": 6}
