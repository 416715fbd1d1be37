"""Edits of an answer so that it follows an instruction."""

import time

import pytest

from uniapl.compose.edits import EDITS, lower_case, quoted, with_ending, with_title, without_commas

PHRASE = {"end_phrase": "That is all for now."}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No change.", "No change."),
        ("Well, yes.", "Well yes."),
        (
            "It costs 1,000 or 12,345,678 euros, or 1,00,000 rupees.",
            "It costs 1000 or 12345678 euros or 100000 rupees.",
        ),
        ("It is 3,5 long, or so.", "It is 3,5 long, or so."),
        ("a,b , c,,d", "a b c d"),
        ("Flour, sugar, and salt, and a pan.", "Flour and sugar and salt and a pan."),
        ("Use rice, meat (beef, lamb, or fish), and oil.", "Use rice meat (beef or lamb or fish) and oil."),
        ("It has apples, pears, and plums.", "It has apples and pears and plums."),
        ("Red, dark green, blue, or grey cars.", "Red or dark green or blue or grey cars."),
        ("In 1990, he left, and she stayed.", "In 1990 he left and she stayed."),
        ("Languages (Python, Java, C++ etc.) help.", "Languages (Python; Java; C++ etc.) help."),
        ("Fruit (e.g., apples) help.", "Fruit (e.g. apples) help."),
        ('"Well," he said, "go."', '"Well" he said "go."'),
        ("First,\nsecond,  \n  third,", "First\nsecond\n  third"),
        (", so", "so"),
        ("$5,$6", "$5 $6"),
        ("是的\uff0c好、吧", "是的 好 吧"),
    ],
)
def test_commas_are_removed(text: str, expected: str) -> None:
    assert without_commas(text, "", {}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", '"Yes."'),
        ('"Bonsoir"', '"Bonsoir"'),
        ('"Good evening" is "Bonsoir"', "\"'Good evening' is 'Bonsoir'\""),
        ('Say "it\'s".', "\"Say 'it's'.\""),
        ('"', '"\'"'),
    ],
)
def test_quotation_marks(text: str, expected: str) -> None:
    assert quoted(text, "", {}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris it is.", "Paris it is. That is all for now."),
        ('He said "go."', 'He said "go." That is all for now.'),
        ("Paris", "Paris\n\nThat is all for now."),
        ("1. One.\n2. Two.", "1. One.\n2. Two.\n\nThat is all for now."),
        ("Yes. That is all for now.", "Yes. That is all for now."),
    ],
)
def test_the_closing_phrase(text: str, expected: str) -> None:
    assert with_ending(text, "", PHRASE) == expected


@pytest.mark.parametrize(
    ("text", "prompt", "title"),
    [
        ("The Nile is the longest river. It flows.", "Name a river.", "Nile is the longest river"),
        ("Yes, retinoids can help, but slowly.", "Do they?", "Retinoids can help"),
        ("Sure, here's a list of the planets:\n\n1. Mars", "Name planets.", "List of the planets"),
        ('1. "Dune" by Frank Herbert\n2. Emma', "Name books.", "Dune by Frank Herbert"),
        ("I'm sorry. No word rhymes.", "Rhyme.", "Word rhymes"),
        ("(Verse 1)\nYo", "Rap.", "Verse 1"),
        (
            "Mars has two moons that Hall saw in the year 1877.",
            "Moons?",
            "Mars has two moons that Hall saw",
        ),
        ("Paris.", "What is the capital of France?", "Capital of France"),
        ("Nile, Po.", "Name two rivers.", "Rivers"),
        ("```\nf(a)\n```\nThe sum of it.", "Please write code that adds.", "Write code that adds"),
        ("x = sum(values)", "Add the values in Python.", "Add the values in Python"),
    ],
)
def test_the_title(text: str, prompt: str, title: str) -> None:
    assert with_title(text, prompt, {}) == f"<<{title}>>\n\n{text}"


@pytest.mark.parametrize("own", ['Title: "Deep Blue"', "# Deep Blue", "**Title:** Deep Blue"])
def test_an_answer_keeps_its_own_title(own: str) -> None:
    assert with_title(f"{own}\n\nThe sea.", "Write a story.", {}) == "<<Deep Blue>>\n\nThe sea."


def test_an_answer_gets_no_second_title() -> None:
    assert with_title("<<Deep Blue>>\nThe sea.", "Write a story.", {}) == "<<Deep Blue>>\nThe sea."


@pytest.mark.parametrize("text", ["a, " * 20_000, "(a, " * 20_000, "a, b c d e, " * 5_000])
def test_long_texts_take_linear_time(text: str) -> None:
    started = time.process_time()
    assert "," not in without_commas(text, "", {})
    assert time.process_time() - started < 2, "a search from each comma took two minutes"


def test_an_answer_without_words_gets_no_title() -> None:
    assert with_title("!", "?", {}) == "!"


def test_edits_are_applied_in_an_order_in_which_none_undoes_another() -> None:
    assert list(EDITS)[-3:] == [
        "punctuation:no_comma",
        "change_case:english_lowercase",
        "startend:quotation",
    ], "titles and closing phrases are in lower case and without commas, too"
    assert lower_case("ÄRGER in Paris", "", {}) == "ärger in paris"
