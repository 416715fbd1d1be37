"""The demo task: verifiers, parser, writers, splits and measurements."""

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from support.runs import lines
from support.sampling import local_sampler
from uniapl.cli.demo import demo
from uniapl.config.resolve import load_recipe, resolve
from uniapl.demo import metrics
from uniapl.demo.constraints import HELD_OUT_COMBINATIONS, Constraint, TaskPrompt, conflict, draw_prompt
from uniapl.demo.language import (
    ADJECTIVES,
    ADVERBS,
    CLASSES,
    DETERMINERS,
    NOUNS,
    OBJECTS,
    PLACES,
    PREPOSITIONS,
    VERBS,
    Sentence,
    fluency,
    parse,
)
from uniapl.demo.measure import measure, score_texts
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH, RECIPE
from uniapl.demo.rewards import constraints_satisfied
from uniapl.demo.task import as_row, make_task, make_tokenizer
from uniapl.demo.writers import EXPERT, SLOPPY, write
from uniapl.errors import UsageError
from uniapl.evaluation import load_suites
from uniapl.models.loading import ModelSource, load_model
from uniapl.rollout import SampleRequest
from uniapl.types import derive_seed

PLAIN = "the king lost a ring ."


def test_no_word_has_two_classes() -> None:
    words = [word for members in CLASSES.values() for word in members]
    assert len(words) == len(set(words))


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    place = draw(st.none() | st.sampled_from(PLACES))
    return Sentence(
        noun=draw(st.sampled_from(NOUNS)),
        verb=draw(st.sampled_from(VERBS)),
        object=draw(st.sampled_from(OBJECTS)),
        determiner=draw(st.sampled_from(DETERMINERS)),
        noun_adjective=draw(st.none() | st.sampled_from(ADJECTIVES)),
        object_adjective=draw(st.none() | st.sampled_from(ADJECTIVES)),
        preposition=draw(st.sampled_from(PREPOSITIONS)) if place else None,
        place=place,
        adverb=draw(st.none() | st.sampled_from(ADVERBS)),
    )


@given(sentences())
def test_a_written_sentence_is_parsed_back(sentence: Sentence) -> None:
    assert parse(sentence.words) == sentence


@given(sentences(), st.data())
def test_a_sentence_with_a_word_removed_or_added_is_parsed_exactly_or_not_at_all(
    sentence: Sentence, data: st.DataObject
) -> None:
    words = list(sentence.words)
    index = data.draw(st.integers(0, len(words) - 1))
    if data.draw(st.booleans()):
        del words[index]
    else:
        words.insert(
            index, data.draw(st.sampled_from([w for c in CLASSES.values() for w in c] + ["the", "."]))
        )
    parsed = parse(words)
    assert parsed is None or list(parsed.words) == words


@pytest.mark.parametrize(
    "text",
    [
        "king lost a ring .",
        "the king lost ring .",
        "the king lost a ring",
        "the king lost a ring near river .",
        "the king lost a ring near .",
        "the king lost a ring the river .",
        "the king lost a ring softly softly .",
        "the king king lost a ring .",
        "a king lost a ring .",
        ".",
        "",
    ],
)
def test_texts_that_are_not_sentences(text: str) -> None:
    assert parse(text.split()) is None
    assert fluency(text) == 0


def test_fluency_by_hand() -> None:
    other = "the old queen held the cup near the river softly ."
    assert fluency(f"{PLAIN} {other}") == 1
    assert fluency(f"{PLAIN} {PLAIN}") == 0.5, "a repetition does not count"
    assert fluency(f"{PLAIN} the king") == 0.5, "an unfinished sentence counts"


@pytest.mark.parametrize(
    ("constraint", "text", "expected"),
    [
        (Constraint("sentences", 1), PLAIN, True),
        (Constraint("sentences", 2), PLAIN, False),
        (Constraint("sentences", 1), f"{PLAIN} the king", False),
        (Constraint("sentences", 1), "", False),
        (Constraint("topic", "king"), PLAIN, True),
        (Constraint("topic", "queen"), PLAIN, False),
        (Constraint("include", "ring"), PLAIN, True),
        (Constraint("include", "rin"), PLAIN, False),
        (Constraint("avoid", "place"), PLAIN, True),
        (Constraint("avoid", "place"), "the king lost a ring near the river .", False),
        (Constraint("avoid", "place"), "", False),
        (Constraint("avoid", "adverb"), "the old king lost a ring .", True),
        (Constraint("avoid", "adjective"), "the old king lost a ring .", False),
        (Constraint("end", "ring"), PLAIN, True),
        (Constraint("end", "ring"), "the king lost a ring", True),
        (Constraint("end", "lost"), PLAIN, False),
        (Constraint("end", "ring"), "", False),
        (Constraint("twice", "old"), "the old king lost a old ring .", True),
        (Constraint("twice", "old"), "the old king lost a ring .", False),
        (Constraint("twice", "king"), "the king king lost a king .", False),
        (Constraint("place"), "the king lost a ring near the river .", True),
        (Constraint("place"), PLAIN, False),
        (Constraint("max_words", 6), "the king lost a golden ring .", True),
        (Constraint("max_words", 6), "the old king lost a golden ring .", False),
        (Constraint("max_words", 6), "", False),
    ],
)
def test_verifiers(constraint: Constraint, text: str, expected: bool) -> None:
    assert constraint.satisfied_by(text) is expected


def test_a_prompt_in_words() -> None:
    extras = (Constraint("include", "dark"), Constraint("avoid", "adverb"), Constraint("max_words", 14))
    prompt = TaskPrompt(sentences=2, topic="farmer", extras=extras)
    assert prompt.text == (
        "write two sentences about the farmer . use dark . do not use adverb . use at most fourteen words ."
    )
    assert prompt.combination == {"include", "avoid", "max_words"}


def test_conflicts() -> None:
    assert conflict(Constraint("avoid", "place"), Constraint("place"))
    assert conflict(Constraint("end", "softly"), Constraint("avoid", "adverb"))
    assert conflict(Constraint("include", "ring"), Constraint("twice", "ring"))
    assert conflict(Constraint("include", "ring"), Constraint("include", "cup"))
    assert not conflict(Constraint("avoid", "place"), Constraint("end", "softly"))
    assert not conflict(Constraint("include", "ring"), Constraint("end", "cup"))


def test_the_expert_passes_its_own_verifiers_on_2000_prompts() -> None:
    task = make_task(seed=1, prompts=2000, demonstrations=2000, held_out=1)
    assert len(task.demonstrations) == 2000
    for prompt, text in task.demonstrations.items():
        assert all(constraint.satisfied_by(text) for constraint in prompt.constraints), (prompt.text, text)
        assert fluency(text) == 1


def test_the_writers_differ_in_style() -> None:
    rng = random.Random(0)
    prompts = [draw_prompt(rng, kinds=("avoid",)) for _ in range(600)]
    free = [p for p in prompts if p.extras[0].argument != "place"]
    expert, sloppy = ([write(p, style, rng) or "" for p in free] for style in (EXPERT, SLOPPY))

    def places(texts: list[str]) -> float:
        return sum(any(word in PLACES for word in text.split()) for text in texts) / len(texts)

    assert places(expert) > places(sloppy) + 0.2
    passed = [all(c.satisfied_by(t) for c in p.constraints) for p, t in zip(free, sloppy, strict=True)]
    assert 0.2 < sum(passed) / len(passed) < 0.6


def test_splits_share_no_prompt_and_training_has_no_held_out_combination() -> None:
    task = make_task(prompts=300, demonstrations=100, held_out=100)
    splits = (set(task.train), set(task.held_out), set(task.held_out_combinations))
    texts = [prompt.text for split in splits for prompt in split]
    assert len(texts) == len(set(texts)) == 500
    assert all(p.combination not in HELD_OUT_COMBINATIONS for p in (*task.train, *task.held_out))
    assert all(p.combination in HELD_OUT_COMBINATIONS for p in task.held_out_combinations)
    assert set(task.demonstrations) <= set(task.train)
    assert len(task.demonstrations) == 100
    assert make_task(prompts=300, demonstrations=100, held_out=100) == task


def test_the_reward_is_the_fraction_of_constraints() -> None:
    prompt = TaskPrompt(sentences=1, topic="king", extras=(Constraint("include", "cup"), Constraint("place")))
    row = as_row(prompt)
    chat = [[{"role": "assistant", "content": PLAIN}], "nonsense"]
    assert constraints_satisfied(chat, [row["constraints"]] * 2) == [0.5, 0.0]


def test_every_word_is_one_token() -> None:
    tokenizer = make_tokenizer()
    task = make_task(prompts=200, demonstrations=200, held_out=10)
    for prompt, text in task.demonstrations.items():
        for words in (prompt.text, text):
            ids = tokenizer(words).input_ids
            assert len(ids) == len(words.split())
            assert tokenizer.pad_token_id not in ids, "an unknown word"
            assert tokenizer.decode(ids) == words


def test_measurements_by_hand() -> None:
    prompts = [
        TaskPrompt(sentences=1, topic="king", extras=(Constraint("include", "ring"),)),
        TaskPrompt(sentences=1, topic="king", extras=(Constraint("place"),)),
    ]
    experts = ["the king lost a ring near the river .", "the king lost a cup near the mill softly ."]
    got = score_texts(prompts, [PLAIN, "the river king"], experts, expert_nll=1.5)
    assert (got.passed, got.fluency, got.good, got.distinct) == (0.5, 0.5, 0.5, 1.0)
    assert got.words == 4.5
    # Lengths 3 and 6, compared with 9 and 10.
    assert got.length_distance == 5.0
    assert got.place_habit == 0.0, "only of the first text: the second prompt asks for a place"


def test_distinct_pairs_of_words_by_hand() -> None:
    prompts = [TaskPrompt(sentences=1, topic="farmer", extras=(Constraint("include", "dark"),))] * 2
    got = score_texts(prompts, ["a b a b", "a b c"], ["x", "y"], expert_nll=0.0)
    # a b, b a, a b; a b, b c: three distinct ones of five.
    assert got.distinct_2 == pytest.approx(3 / 5)
    assert score_texts(prompts, ["a", "b"], ["x", "y"], expert_nll=0.0).distinct_2 == 0


def test_the_nll_of_sampled_texts_equals_the_sampling_logprobs() -> None:
    task = make_task(prompts=1, demonstrations=0, held_out=6)
    base = Path(str(files("uniapl.demo") / "base"))
    model = load_model(ModelSource(base=str(base)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    got, _ = measure(model, tokenizer, task.held_out, seed=3, reference=model)
    chats = [[{"role": "user", "content": prompt.text}] for prompt in task.held_out]
    prompts = [
        tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]
    sampler = local_sampler(
        model=model,
        stop_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    seeds = [derive_seed(3, "measure", index) for index in range(len(prompts))]
    groups = sampler.sample(SampleRequest(prompts=prompts, seeds=seeds, num_generations=1))
    logprobs = [value for (rollout,) in groups for value in rollout.sampling_logprobs]
    assert got.reference_nll == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-4)
    assert measure(model, tokenizer, task.held_out, seed=3)[0].reference_nll is None


def test_excluded_prompts_do_not_occur() -> None:
    first = make_task(prompts=60, demonstrations=5, held_out=20)
    again = make_task(prompts=60, demonstrations=5, held_out=20, without=first.texts)
    assert len(again.texts) == len(first.texts) == 100
    assert not again.texts & first.texts


def test_the_demo_runs_from_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_task(prompts=24, demonstrations=12, held_out=16)
    flags = ["--output-dir", str(tmp_path / "run"), "--max-steps", "2", "--batching.prompts-per-step", "2"]
    measured = demo(flags, task=task)
    before, after = measured["base"], measured["uniapl"]
    assert before.fluency > 0.85, "the base writes well-formed sentences"
    assert before.expert_nll < 2
    assert before != after
    output = capsys.readouterr().out
    assert next(iter(task.held_out)).text in output.replace("\n", " ")
    assert "satisfies every constraint" in output
    found = json.loads((tmp_path / "run" / "measurements.json").read_text())
    good = {"base": f"{before.good:.2f}", "uniapl": f"{after.good:.2f}"}
    assert dict(zip(found["models"], found["rows"][0]["values"], strict=True)) == good
    page = (tmp_path / "run" / "report.html").read_text()
    assert "16 held-out prompts, one completion each" in page


def test_metrics_of_the_demo_by_hand() -> None:
    place = "the king lost a ring near the river ."
    wanted = [["topic", "king"], ["include", "ring"]]
    assert metrics.good([PLAIN, f"{PLAIN} {PLAIN}", "ring king"], [wanted] * 3) == [1.0, 0.0, 0.0]
    assert metrics.passed([PLAIN, "the ring"], [wanted] * 2) == [1.0, 0.0]
    assert metrics.fluent([[{"role": "assistant", "content": f"{PLAIN} {PLAIN}"}]]) == [0.5]
    habits = metrics.place_habit([place, PLAIN, place], [wanted, wanted, [*wanted, ["max_words", 9]]])
    assert habits == [1.0, 0.0, None], "a limit of words leaves no room for a place"


def test_the_task_is_written_as_files_with_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_task(prompts=6, demonstrations=4, held_out=3)
    assert demo(["--write", "task", "--max-steps", "7", "--reward", "half"], task=task) == {}
    assert "uniapl compare task/recipe.yaml" in capsys.readouterr().out
    names = ("train", "held_out", "held_out_combinations")
    rows = {name: lines(Path(f"task/{name}.jsonl")) for name in names}
    assert rows["train"] == task.rows
    assert [row["completion"][0]["content"] for row in rows["held_out"]] == [*task.held_out.values()]
    assert len(rows["held_out_combinations"]) == 3
    config = resolve(load_recipe("task/recipe.yaml")).config
    assert (config.max_steps, config.batching, config.optim) == (7, *expected())
    assert config.rewards.functions[0].name == "uniapl.demo.rewards:limits_satisfied"
    assert config.evaluation.metrics[0] == "uniapl.demo.metrics:good"
    tokenizer = AutoTokenizer.from_pretrained("task/base")
    suites = load_suites(config, tokenizer)
    assert [(suite.name, suite.headline) for suite in suites] == [(name, "good") for name in names[1:]]
    scores, failure = suites[0].score(suites[0].examples, [*task.held_out.values()], [(1,)] * 3)
    assert failure is None
    assert [score["good"] for score in scores] == [[1.0]] * 3, "the expert is good"
    with pytest.raises(UsageError, match="'task' is not empty"):
        demo(["--write", "task"], task=task)
    with pytest.raises(UsageError, match="--write needs a directory"):
        demo(["--write"], task=task)
    with pytest.raises(UsageError, match="unknown reward 'hones': choose one of honest"):
        demo(["--write", "other", "--reward", "hones"], task=task)


def expected() -> tuple[Any, Any]:
    found = resolve(RECIPE).config
    return found.batching, found.optim


def test_the_shipped_model_is_small() -> None:
    base = files("uniapl.demo") / "base"
    assert sum(len(file.read_bytes()) for file in base.iterdir()) < 4 * 2**20
