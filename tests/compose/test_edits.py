"""Edits of an answer so that it follows an instruction."""

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
        ("1,2 and 1990,2000", "1 2 and 1990 2000"),
        ("a,b , c,,d", "a b c d"),
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
    ("prompt", "title"),
    [
        ("Does the 5 second rule actually exist?", "Does the 5 second rule actually exist"),
        ("Can you tell me how to bake bread?", "How to bake bread"),
        ("What are the best exercises for beginners?", "Best exercises for beginners"),
        ("Name a river, please.", "Name a river"),
        ("Write a poem.", "Write a poem"),
        ("Explain The Old Man and the Sea to me.", "The Old Man and the Sea to me"),
        ("I'd like you to write me a story about rain.", "Story about rain"),
        ("Answer the following question.\n\nWhy is it wet?\nI left it out. It rained.", "Why is it wet"),
        ("Read the books of John K. Smith first.", "Read the books of John K. Smith first"),
        ('Answer the question.\n\nHow do you say "good evening"?', "How do you say good evening"),
        ("Name a band like this one.\n\nthe Beatles", "The Beatles"),
        (
            "If a train is late, and nobody says so, how would you find out when the next one leaves?",
            "How would you find out when the next one leaves",
        ),
        (
            "Describe the history of the old stone bridge that was built by monks over the river long ago.",
            "History of the old stone bridge",
        ),
        ("Compare a < b with b > a.", "Compare a b with b a"),
        ("???", "Because it rains"),
        ("And why?", "Because it rains"),
    ],
)
def test_the_title(prompt: str, title: str) -> None:
    assert with_title("Because it rains.", prompt, {}) == f"<<{title}>>\n\nBecause it rains."


@pytest.mark.parametrize("own", ['Title: "Deep Blue"', "# Deep Blue", "**Title:** Deep Blue"])
def test_an_answer_keeps_its_own_title(own: str) -> None:
    assert with_title(f"{own}\n\nThe sea.", "Write a story.", {}) == "<<Deep Blue>>\n\nThe sea."


def test_an_answer_without_words_gets_no_title() -> None:
    assert with_title("!", "?", {}) == "!"


def test_edits_are_applied_in_an_order_in_which_none_undoes_another() -> None:
    assert list(EDITS)[-3:] == [
        "punctuation:no_comma",
        "change_case:english_lowercase",
        "startend:quotation",
    ], "titles and closing phrases are in lower case and without commas, too"
    assert lower_case("ÄRGER in Paris", "", {}) == "ärger in paris"
