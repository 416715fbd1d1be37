"""`uniapl compose`: each instruction can be followed, and its wording agrees with its checker."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.benchmark_data import IFBENCH, IFEVAL, STAND_INS, on_stand_ins_and_real_data, rows
from support.runs import recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.compose.prompts import all_conflicts, compose_prompt
from uniapl.compose.wordings import ENDINGS, FURTHER_CONFLICTS, KINDS, LANGUAGES, NOUNS, RARE, say
from uniapl.evaluation.contamination import overlap
from uniapl.rewards.checkers import Instruction, parameters
from uniapl.rewards.instructions import check_instructions, instructions

BASES = ["Name a river, please.", "Why do leaves fall?", "Describe a market.", "Explain gravity to a child."]
GERMAN = "Das ist ein ziemlich langer Satz, damit man die Sprache gut erkennen kann."
TEXTS = {
    "de": GERMAN,
    "fr": "Voici une phrase assez longue pour que la langue soit facile à reconnaître.",
    "es": "Esta es una frase bastante larga para que el idioma se pueda reconocer bien.",
    "it": "Questa è una frase abbastanza lunga perché la lingua si possa riconoscere bene.",
    "pt": "Esta é uma frase bastante longa para que a língua possa ser reconhecida sem dúvida.",
    "pl": "To jest dość długie zdanie, żeby można było łatwo rozpoznać język.",
}


def enough(relation: str, number: int) -> int:
    """The number that just satisfies a relation."""
    return number if relation == "at least" else number - 1


def completions_for(kind: str, a: dict[str, Any]) -> tuple[str, str]:
    """(a completion that just follows the instruction, one that just misses it), written by hand."""
    plain = "This is a plain English sentence about the weather and the sea."
    match kind.partition(":")[2]:
        case "existence":
            return " ".join(a["keywords"]), " ".join(a["keywords"][:-1]) or "none"
        case "frequency":
            right, wrong = (
                enough(a["relation"], a["frequency"]) + step
                for step in (0, {"at least": -1}.get(a["relation"], 1))
            )
            return f"x {a['keyword']} " * right or "x", f"x {a['keyword']} " * wrong or "x"
        case "forbidden_words":
            return "A text.", f"A text, {a['forbidden_words'][-1]}."
        case "letter_frequency":
            step = -1 if a["let_relation"] == "at least" else 1
            right = enough(a["let_relation"], a["let_frequency"])
            return "-" + a["letter"] * right, "-" + a["letter"] * (right + step)
        case "response_language":
            return TEXTS[a["language"]], plain
        case "number_sentences":
            step = -1 if a["relation"] == "at least" else 1
            right = enough(a["relation"], a["num_sentences"])
            return "It is so. " * right, "It is so. " * (right + step)
        case "number_paragraphs":
            return "\n***\n".join(["text"] * a["num_paragraphs"]), "\n***\n".join(
                ["text"] * (a["num_paragraphs"] + 1)
            )
        case "number_words":
            step = -1 if a["relation"] == "at least" else 1
            right = enough(a["relation"], a["num_words"])
            return "word " * right, "word " * (right + step)
        case "nth_paragraph_first_word":
            parts = ["Other text."] * a["num_paragraphs"]
            wrong = "\n\n".join(parts)
            parts[a["nth_paragraph"] - 1] = f"{a['first_word']} text."
            return "\n\n".join(parts), wrong
        case "number_placeholders":
            return "[name] " * a["num_placeholders"], "[name] " * (a["num_placeholders"] - 1) + "x"
        case "postscript":
            return f"A text.\n{a['postscript_marker']} And this.", "A text."
        case "number_bullet_lists":
            return "* one\n" * a["num_bullets"], "* one\n" * (a["num_bullets"] + 1)
        case "constrained_response":
            return "My answer is maybe.", "Maybe."
        case "number_highlighted_sections":
            return "*so* " * a["num_highlights"], "*so* " * (a["num_highlights"] - 1) + "x"
        case "multiple_sections":
            heads = [f"{a['section_spliter']} {i + 1}\ntext\n" for i in range(a["num_sections"])]
            return "".join(heads), "".join(heads[:-1])
        case "json_format":
            return '{"a": 1}', '{"a": 1'
        case "title":
            return "<<A title>>\ntext", "A title\ntext"
        case "two_responses":
            return "One.\n******\nAnother.", "One.\n******\nOne."
        case "repeat_prompt":
            return f"{a['prompt_to_repeat']}\nWell.", "Well."
        case "end_checker":
            return f"A text. {a['end_phrase']}", f"{a['end_phrase']} More."
        case "capital_word_frequency":
            step = -1 if a["capital_relation"] == "at least" else 1
            right = enough(a["capital_relation"], a["capital_frequency"])
            return "so " + "LOUD " * right, "so " + "LOUD " * (right + step)
        case "english_capital":
            return plain.upper(), plain
        case "english_lowercase":
            return plain.lower(), plain
        case "no_comma":
            return "No comma here.", "One, here."
        case "quotation":
            return '"A text."', "A text."
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_arguments_are_checked(kind: str) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        arguments = KINDS[kind].draw(rng, "Name a river, please.", set())
        assert sorted(arguments) == sorted(parameters(kind))
        instruction = Instruction(kind, arguments)
        assert instruction.is_determined()
        right, wrong = completions_for(kind, arguments)
        assert instruction.followed_by(right), (arguments, right)
        assert not instruction.followed_by(wrong), (arguments, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_contains_every_argument(kind: str) -> None:
    arguments = KINDS[kind].draw(random.Random(0), "Name a river, please.", set())
    said = {say(KINDS[kind], arguments, random.Random(seed)) for seed in range(60)}
    assert len(said) >= len(KINDS[kind].wordings) >= 2
    for sentence in said:
        assert "{" not in sentence
        for name, value in arguments.items():
            if name == "prompt_to_repeat":
                continue
            if name.endswith("relation"):
                assert any(
                    word in sentence for word in ("at least", "no fewer than", "less than", "fewer than")
                )
            elif name == "language":
                assert LANGUAGES[value] in sentence
            else:
                for part in value if isinstance(value, list) else [value]:
                    assert str(part) in sentence, (name, sentence)


@on_stand_ins_and_real_data
def test_no_wording_occurs_in_a_benchmark(benchmarks: Path) -> None:
    said = [
        say(kind, kind.draw(random.Random(seed), "Name a river, please.", set()), random.Random(seed))
        for kind in KINDS.values()
        for seed in range(30)
    ]
    theirs = [row["prompt"] for row in rows(benchmarks / IFEVAL) + rows(benchmarks / IFBENCH)]
    assert overlap(said, theirs).ngram == {}
    assert overlap([f"{theirs[0]} {said[0]}"], theirs).ngram == {0: 0}, "a prompt of theirs would be found"


def test_no_two_instructions_of_a_prompt_conflict() -> None:
    forbidden = all_conflicts()
    assert set(forbidden) == set(KINDS)
    assert all(one in forbidden[other] for one in forbidden for other in forbidden[one]), "both ways"
    for kind, others in FURTHER_CONFLICTS.items():
        assert others <= forbidden[kind]
    assert "change_case:capital_word_frequency" in forbidden["detectable_format:multiple_sections"], "PART 1"
    counts: dict[int, int] = {}
    for seed in range(400):
        row = compose_prompt("Name a river.", random.Random(seed), list(KINDS), 5, forbidden)
        kinds = row["instruction_id_list"]
        counts[len(kinds)] = counts.get(len(kinds), 0) + 1
        assert len(set(kinds)) == len(kinds)
        assert not any(a in forbidden[b] for a in kinds for b in kinds if a != b)
        instructions(row["prompt"], kinds, row["kwargs"])
        used = [
            word
            for given in row["kwargs"]
            for key in ("keywords", "forbidden_words")
            for word in given.get(key, [])
        ]
        assert len(set(used)) == len(used), "no word is both requested and forbidden"
    assert set(counts) == {1, 2, 3, 4, 5}


def test_instructions_of_a_prompt_use_distinct_nouns() -> None:
    """Two kinds that draw nouns never draw the same one."""
    kinds = ["keywords:existence", "keywords:frequency", "length_constraints:nth_paragraph_first_word"]
    for seed in range(300):
        taken: set[str] = set()
        rng = random.Random(seed)
        drawn = [KINDS[kind].draw(rng, "", taken) for kind in kinds]
        words = [*drawn[0]["keywords"], drawn[1]["keyword"], drawn[2]["first_word"]]
        assert len(set(words)) == len(words)


def test_rare_letters_can_be_avoided() -> None:
    assert not set(RARE) & set("".join([*NOUNS, *ENDINGS]))


def write(path: Path, prompts: list[Any], **columns: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, **columns}) + "\n" for prompt in prompts))
    return path


def run(base: Path, output: Path, *flags: str, benchmarks: Path = STAND_INS) -> int:
    known = [f"ifeval={benchmarks / IFEVAL}", f"ifbench={benchmarks / IFBENCH}"]
    return cli.run(["compose", str(base), "-o", str(output), "--benchmarks", *known, *flags])


def test_the_same_seed_gives_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.jsonl", [*BASES, BASES[0]], completion="An answer.")
    assert run(base, tmp_path / "a.jsonl", "--per-prompt", "3", "--seed", "5") == 0
    assert run(base, tmp_path / "b.jsonl", "--per-prompt", "3", "--seed", "5") == 0
    assert run(base, tmp_path / "c.jsonl", "--per-prompt", "3", "--seed", "6") == 0
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    composed = rows(tmp_path / "a.jsonl")
    one = write(tmp_path / "one.jsonl", ["Name a river."])
    flags = ("--kinds", "punctuation:no_comma", "--per-prompt", "40")
    assert run(one, tmp_path / "d.jsonl", *flags) == 0
    assert len(rows(tmp_path / "d.jsonl")) == 9, "three wordings, three ways to join"
    assert "31 duplicate prompts were dropped" in capsys.readouterr().out
    assert len({row["prompt"] for row in composed}) == len(composed) >= 12
    assert all(row["prompt"].startswith(BASES[(row["base_row"] - 1) % 4]) for row in composed)
    assert not any("completion" in row for row in composed)
    assert "base" not in composed[0]


def test_demonstrations_are_left_out_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered = [{"role": "user", "content": BASES[0]}, {"role": "assistant", "content": "An answer."}]
    made: list[dict[str, Any]] = [{"prompt": prompt, "completion": "An answer."} for prompt in BASES]
    made += [{"prompt": "Name a lake."}, {"messages": answered}, {"messages": answered[:1]}]
    base = tmp_path / "base.jsonl"
    base.write_text("".join(json.dumps(row) + "\n" for row in made))
    assert run(base, tmp_path / "a.jsonl") == 0
    assert "note: 5 demonstrations were left out" in (said := " ".join(capsys.readouterr().out.split()))
    assert "--from-demonstrations edits them" in said


def test_chat_prompts_keep_their_earlier_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}]
    base = write(tmp_path / "base.jsonl", [turns])
    assert run(base, tmp_path / "out.jsonl", "--kinds", "punctuation:no_comma") == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["prompt"][0] == turns[0]
    assert row["prompt"][1]["content"].startswith("Name a river.")
    assert row["instruction_id_list"] == ["punctuation:no_comma"]


def test_composed_prompts_are_trained_on(tmp_path: Path) -> None:
    """Completions are scored by the instructions of their rows."""
    base = write(tmp_path / "base.jsonl", ["say a.", "say b.", "say c."])
    out = tmp_path / "train.jsonl"
    assert (
        run(base, out, "--kinds", "punctuation:no_comma", "keywords:letter_frequency", "--per-prompt", "2")
        == 0
    )
    values = recipe(save_model(tmp_path / "model"), tmp_path / "run", method="grpo", max_steps=2)
    values |= {"data": {"path": str(out)}, "rewards": {"functions": ["instruction_following"]}}
    uniapl.train(values | {"rollout": {"num_generations": 4, "max_completion_length": 20}})
    by_prompt = {row["prompt"]: row for row in rows(out)}
    groups = rows(tmp_path / "run" / "completions.jsonl")
    assert len(groups) == 6
    for group in groups:
        row = by_prompt[group["prompt"]]
        given = instructions(row["prompt"], row["instruction_id_list"], row["kwargs"])
        expected = [float(all(check_instructions(given, one["text"]))) for one in group["completions"]]
        assert [one["reward"] for one in group["completions"]] == expected


@on_stand_ins_and_real_data
def test_a_benchmark_prompt_is_refused(
    benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stolen = rows(benchmarks / IFEVAL)[3]["prompt"]
    base = write(tmp_path / "base.jsonl", [BASES[0], stolen])
    out = tmp_path / "out.jsonl"
    assert run(base, out, benchmarks=benchmarks) == 2
    assert "1 prompts overlap with a benchmark's" in (said := capsys.readouterr().err)
    assert "row 2 and ifeval row 4" in said
    assert not out.exists()
    assert run(base, out, "--overlap", "drop", benchmarks=benchmarks) == 0
    assert [row["base_row"] for row in rows(out)] == [1]
    assert run(base, out, "--overlap", "allow", benchmarks=benchmarks) == 0
    assert [row["base_row"] for row in rows(out)] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kinds", "no_comma"], "--kinds: unknown no_comma"),
        (["-o", "out.json"], "--output 'out.json' must end in .jsonl"),
        (["--max-instructions", "0"], "--max-instructions must be at least 1"),
        (["--benchmarks", "ifeval=/nowhere.jsonl"], "set --benchmarks ifeval=PATH, or --overlap allow"),
    ],
)
def test_invalid_options(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "base.jsonl", BASES)
    assert run(base, tmp_path / "out.jsonl", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Two."}, "row 2 has no 'prompt' and no 'messages'"),
        ({"prompt": "Two.", "instruction_id_list": []}, "row 2 already has instructions"),
        ({"prompt": "  "}, "row 2: the prompt is empty"),
        ({"messages": "Two."}, "row 2: 'messages' must be"),
        ({"prompt": [{"role": "user"}]}, "row 2: 'prompt' must be"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            "row 2: 'prompt', message 1: a part of type 'text' has no 'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user message"),
    ],
)
def test_an_unusable_row_is_named(
    row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.jsonl").write_text(f'{{"prompt": "One."}}\n{json.dumps(row)}\n')
    assert run(tmp_path / "base.jsonl", tmp_path / "out.jsonl") == 2
    assert message in capsys.readouterr().err


def test_only_the_given_benchmarks_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.jsonl", [BASES[0], rows(STAND_INS / IFEVAL)[3]["prompt"]])
    theirs = write(tmp_path / "theirs.jsonl", ["Another subject."])
    command = ["compose", str(base), "-o", str(tmp_path / "out.jsonl"), "--benchmarks", f"mine={theirs}"]
    assert cli.run(command) == 0
    note = "note: the prompts were not compared with those of ifbench, ifeval"
    assert note in " ".join(capsys.readouterr().out.split())
    assert cli.run([*command, f"ifeval={STAND_INS / IFEVAL}"]) == 2
    printed = capsys.readouterr()
    assert "row 2 and ifeval row 4" in printed.err
    assert "not compared with those of ifbench" in printed.out


def test_a_short_benchmark_prompt_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = write(tmp_path / "theirs.jsonl", ["Name a river, please."])
    base = write(tmp_path / "base.jsonl", ["name a river please", "Another."])
    command = ["compose", str(base), "-o", str(tmp_path / "out.jsonl"), "--benchmarks"]
    command += [f"mine={theirs}", f"ifeval={STAND_INS / IFEVAL}", f"ifbench={STAND_INS / IFBENCH}"]
    assert cli.run(command) == 2
    assert "row 1 and mine row 1" in capsys.readouterr().err
    assert cli.run([*command, "--overlap", "drop"]) == 0
    assert [row["base_row"] for row in rows(tmp_path / "out.jsonl")] == [2]
    alone = write(tmp_path / "alone.jsonl", ["name a river please"])
    assert cli.run(["compose", str(alone), *command[2:], "--overlap", "drop"]) == 2
    assert "no prompt is left" in capsys.readouterr().err
    assert cli.run(["compose", str(base), "-o", str(base), *command[4:]]) == 2
    assert "--output is the file of the base prompts" in capsys.readouterr().err
