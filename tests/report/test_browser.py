"""The page in a real browser: content, controls, and no network access."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import (
    alternating,
    answer,
    calling,
    large_run,
    metric_rows,
    prompt_row,
    trajectory,
    write_run,
)
from uniapl.report import write_report
from uniapl.report.analysis import smoothed

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]

WIDTHS = (1280, 390)
Open = Callable[[Path, int], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium has no sandbox as root in a container.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a file at a width; no console message and no other request may occur."""
    said: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def opened(path: Path, width: int) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="light")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#entries .entry")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert len(asked) == len(contexts)
    assert all(url.startswith("file://") for url in asked)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty completions of three prompts in ten steps, rewards 0.0 to 2.9, win rates 0.00 to 0.29."""
    rows = [
        prompt_row(
            step,
            [
                answer(
                    f"answer {3 * (step - 1) + place}",
                    reward=(3 * (step - 1) + place) / 10,
                    rewards={"right": float(place % 2)},
                    win_rate=(3 * (step - 1) + place) / 100,
                    tokens=100 - (3 * (step - 1) + place),
                    finish_reason="length" if place == 2 else "stop",
                )
                for place in range(3)
            ],
            prompt=("Name a bird.", "Name a <b>fish</b>.", "Name a tree.")[step % 3],
        )
        for step in range(1, 11)
    ]
    path = tmp_path_factory.mktemp("small") / "run"
    write_run(path, metric_rows(10), rows, end_state={"state": "finished", "message": ""}, max_steps=10)
    write_report([path], path / "report.html")
    return path / "report.html"


def shown(page: Any) -> list[str]:
    return page.locator("#entries .policy .text").all_inner_texts()


def numbers(texts: list[str]) -> list[int]:
    return [int(text.split()[-1]) for text in texts]


@pytest.mark.parametrize("width", WIDTHS)
def test_completions_are_filtered_sorted_and_paged(small: Path, open_page: Open, width: int) -> None:
    page = open_page(small, width)
    assert numbers(shown(page)) == list(range(21)), "whole groups of three, at least 20 completions"
    page.click("#next")
    assert numbers(shown(page)) == list(range(21, 30))
    assert page.inner_text("#page-number") == "page 2 of 2"
    page.fill("[name=text]", "BIRD")
    assert numbers(shown(page)) == [6, 7, 8, 15, 16, 17, 24, 25, 26]
    page.fill("[name=step-from]", "4")
    page.fill("[name=step-to]", "6")
    assert numbers(shown(page)) == [15, 16, 17]
    page.select_option("[name=finish]", "length")
    assert numbers(shown(page)) == [17]
    page.click("button[type=reset]")
    page.get_by_text("30 of 30 completions").wait_for()
    page.fill("[name=reward-from]", "2.6")
    page.fill("[name=win-to]", "0.28")
    assert numbers(shown(page)) == [26, 27, 28]
    page.select_option("[name=order]", "down")
    for key in ("reward", "win", "step"):
        page.select_option("[name=sort]", key)
        assert numbers(shown(page)) == ([28, 27, 26] if key != "step" else [27, 28, 26])
    page.select_option("[name=sort]", "tokens")
    assert numbers(shown(page)) == [26, 27, 28]


def test_an_entry_shows_all_values(small: Path, open_page: Open) -> None:
    page = open_page(small, 1280)
    page.fill("[name=text]", "fish")
    first = page.locator(".entry").first
    assert first.locator(".prompt").inner_text() == "Name a <b>fish</b>."
    assert first.locator(".expert .text").all_inner_texts() == ["It is."], "once for all completions"
    assert first.locator("> header").inner_text().split("\n")[:2] == ["step 1", "3 completions"]
    headers = first.locator(".policy header").all_inner_texts()
    for part in ("✕ reward 0", "advantage 0", "win rate 0", "tokens 100", "finish reason stop"):
        assert part in headers[0]
    assert "right" not in headers[0], "its value is the reward"
    assert "reward 0.100" in headers[1]
    assert "✓ right 1" in headers[1]
    first.get_by_role("button").click()
    page.fill("[name=text]", "")
    steps = [0, 1, 2, 9, 10, 11, 18, 19, 20, 27, 28, 29]
    assert numbers(shown(page)) == steps, "steps 1, 4, 7 and 10"
    assert page.locator(".entry button").count() == 0
    page.click("#all-prompts")
    assert len(shown(page)) == 21


def test_completions_are_grouped_by_prompt(tmp_path: Path, open_page: Open) -> None:
    """Rewards 5, 1, 9 for one prompt, 3 and 7 for another: the first value of a group gives its place."""
    rewards = {"one": (5.0, 1.0, 9.0), "other": (3.0, 7.0)}
    rows = [
        prompt_row(1, [answer(f"is {value:.0f}", reward=value) for value in values], prompt=prompt)
        for prompt, values in rewards.items()
    ]
    path = write_run(tmp_path / "run", metric_rows(1), rows)
    write_report([path], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html", 390)
    assert page.locator(".entry").count() == 2
    assert page.locator(".entry button").count() == 0, "no prompt occurs in another step"
    page.select_option("[name=sort]", "reward")
    assert numbers(shown(page)) == [1, 5, 9, 3, 7]
    page.fill("[name=reward-from]", "2")
    assert numbers(shown(page)) == [3, 7, 5, 9]
    assert page.locator(".entry > header").all_inner_texts() == [
        "step 1\n2 completions",
        "step 1\n2 of 3 completions",
    ]
    page.select_option("[name=order]", "down")
    assert numbers(shown(page)) == [9, 5, 7, 3]
    assert page.locator(".prompt").all_inner_texts() == ["one", "other"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_theme_switches_and_the_page_is_not_wider_than_the_screen(
    small: Path, open_page: Open, width: int
) -> None:
    page = open_page(small, width)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(ground) != light
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_charts_react_to_pointer_keys_and_controls(small: Path, open_page: Open) -> None:
    page = open_page(small, 1280)
    chart = page.locator(".chart", has=page.get_by_role("heading", name="Reward", exact=True))
    picture = chart.locator("svg[role=img]")
    assert picture.get_attribute("aria-label").startswith("Reward, over step: mean from 0.180 to 0.900")
    assert chart.locator(".legend b").inner_text() == "0.900"
    picture.focus()
    page.keyboard.press("Home")
    assert "step 1" in chart.locator(".legend").inner_text()
    assert chart.locator(".legend b").inner_text() == "0.180"
    page.keyboard.press("ArrowRight")
    assert chart.locator(".legend b").inner_text() == "0.260"
    box = picture.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 50)
    assert "step 10" in chart.locator(".legend").inner_text()
    line = chart.locator("path.line:not(.raw)")
    before = line.get_attribute("d")
    assert chart.locator("path.raw").count() == 0, "5 % of ten values are less than one"
    page.locator("#smoothing").fill("0.25")
    assert page.inner_text("#smoothing-value") == "25 %"
    assert line.get_attribute("d") != before
    assert chart.locator("path.raw").get_attribute("d") == before
    values = [3.0, 6.0, None, 13.0]
    smooth = page.evaluate("([values, fraction]) => smoothed(values, fraction)", [values, 2 / 3])
    assert smooth == pytest.approx(smoothed(values, 2 / 3)), "as in Python, whose values are by hand"
    norm = page.locator(".chart", has=page.get_by_role("heading", name="Gradient norm", exact=True))
    before = norm.locator("path.raw").get_attribute("d")
    norm.get_by_role("button", name="log").click()
    assert norm.locator("path.raw").get_attribute("d") != before


@pytest.mark.parametrize("width", WIDTHS)
def test_data_is_never_markup(tmp_path: Path, open_page: Open, width: int) -> None:
    nasty = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
    said = answer(nasty, rewards={nasty: 1.0}, finish_reason=nasty)
    rows = [prompt_row(1, [said], prompt=nasty, demonstration=nasty)]
    metrics = [
        {"step": 1, "stage": 0, f"eval/{nasty}": 1.0, f"health/{nasty}": 1, "early_stopping/reason": nasty}
    ]
    path = write_run(tmp_path / "<b>run", metrics, rows, end_state={"state": "stopped", "message": nasty})
    write_report([path], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html", width)
    assert page.locator(".entry .prompt").inner_text() == nasty
    assert shown(page) == [nasty]
    assert page.title() == "<b>run · uniapl report"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3


HOSTILE = "</li></script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>\"'\0\u202e"


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thought, a failed call and a long result; a replaced trajectory; a completion without tools."""
    first = calling("add", "sub", a=1)
    results = [{"role": "tool", "name": name, "content": "3"} for name in ("add", "sub")]
    end = {"role": "assistant", "content": "3"}
    segments = ["<think>hm</think>call", "3" * 601, "done<|im_end|>"]
    use = {"calls": 2, "failures": [1], "malformed": 1}
    one = trajectory([first, *results, end], segments, use)
    late = trajectory([calling("add")], ["late"], {"unanswered": 1})
    shown = alternating(["shown", "given", "end"])
    rows = [
        prompt_row(1, [one, late], demonstration_segments=shown),
        prompt_row(1, [answer("plain")], demonstration=None),
        prompt_row(1, [late], demonstration=None, discarded=True),
    ]
    path = tmp_path_factory.mktemp("tools") / "run"
    write_run(path, metric_rows(1), rows)
    write_report([path], path / "report.html")
    return path / "report.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_trained_is_marked_by_words_and_by_a_line(
    with_tools: Path, open_page: Open, width: int
) -> None:
    page = open_page(with_tools, width)
    labels = [entry.locator(".who").all_inner_texts() for entry in page.locator(".entry").all()]
    wrote, read = "✎ Policy wrote: trained", "⊘ Policy read: not trained"
    expert = ["✎ Expert wrote: trained where mu > 0", "⊘ Expert read: not trained"]
    assert labels == [
        [*expert, expert[0], wrote, read, wrote, wrote],
        [],
        ["✎ Policy wrote: not trained, replaced"],
    ]
    texts = page.locator(".entry").first.locator(".policy .wrote .text").all_inner_texts()
    assert texts == ["<think>hm</think>", "call", "done<|im_end|>", "late"]
    style = "(e) => [getComputedStyle(e).borderLeftStyle, getComputedStyle(e).borderLeftColor]"
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        kinds = (".policy .wrote", ".policy .read", ".expert .wrote", ".expert .read")
        lines = [page.locator(kind).first.evaluate(style) for kind in kinds]
        assert [line for line, _ in lines] == ["solid", "dashed"] * 2
        assert lines[0][1] != lines[1][1] != lines[2][1]
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_calls_have_their_outcomes_and_entries_their_counts(with_tools: Path, open_page: Open) -> None:
    page = open_page(with_tools, 1280)
    first, late, plain, _ = page.locator(".policy").all()
    assert first.locator(".calls li").all_inner_texts() == [
        'call add {"a": 1} ✓ answered',
        'call sub {"a": 1} ✕ failed',
    ]
    assert late.locator(".calls li").all_inner_texts() == [
        "call add {} ✕ unanswered: after the last iteration"
    ]
    assert "malformed: begins a call that cannot be read" in first.locator(".wrote").nth(1).inner_text()
    assert "malformed" not in first.locator(".wrote").nth(0).inner_text()
    headers = [entry.locator("header").inner_text() for entry in (first, late, plain)]
    assert re.search(r"tool calls\s2\s+✕ failed 1\s+✕ malformed 1", headers[0])
    assert re.search(r"tool calls\s0\s+✕ unanswered 1", headers[1])
    assert "tool" not in headers[2]
    assert plain.locator(".text").all_inner_texts() == ["plain"]


def test_long_results_are_opened_by_keys(with_tools: Path, open_page: Open) -> None:
    page = open_page(with_tools, 1280)
    details = page.locator("details", has=page.get_by_text("result of add, sub, 601 characters"))
    text = details.locator(".text")
    assert not text.is_visible()
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert text.is_visible()
    assert text.inner_text() == "3" * 601
    page.keyboard.press("Tab")
    assert text.evaluate("(e) => e === document.activeElement"), "keys can scroll it"
    assert page.locator(".entry details").count() == 1, "short texts are not folded"


@pytest.mark.parametrize("width", WIDTHS)
def test_tools_and_calls_are_never_markup(tmp_path: Path, open_page: Open, width: int) -> None:
    """The result of a tool is 1 MB; names and arguments of calls are hostile too."""
    first = calling(HOSTILE, **{HOSTILE: HOSTILE})
    result = {"role": "tool", "name": HOSTILE, "content": HOSTILE}
    end = {"role": "assistant", "content": HOSTILE}
    segments = [HOSTILE, HOSTILE + "x" * 1_000_000, HOSTILE]
    one = trajectory([first, result, end], segments, {"calls": 1})
    rows = [prompt_row(1, [one], demonstration_segments=alternating([HOSTILE, HOSTILE, HOSTILE]))]
    path = write_run(tmp_path / "run", metric_rows(1), rows)
    write_report([path], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html", width)
    shown_text = HOSTILE.replace("\0", "⟨U+0000⟩").replace("\u202e", "⟨U+202E⟩")
    assert page.locator(".policy .wrote .text").all_inner_texts() == [shown_text] * 2
    assert page.locator(".expert .text").all_inner_texts() == [shown_text] * 3
    page.locator("summary", has_text="characters").first.click()
    text = page.locator(".policy .read .text").inner_text()
    assert text.startswith(shown_text + "xxx")
    assert text.endswith("more characters in completions.jsonl)")
    assert page.title() == "run · uniapl report"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_run_without_tools_has_no_turns(small: Path, open_page: Open) -> None:
    page = open_page(small, 1280)
    assert page.locator(".turns, .who, .calls, .entry details").count() == 0
    assert "tool" not in page.inner_text("#entries")


def test_a_large_run_opens(tmp_path: Path, open_page: Open, record_property: Callable[..., None]) -> None:
    path = large_run(tmp_path / "run")
    write_report([path], path / "report.html")
    began = time.monotonic()
    page = open_page(path / "report.html", 1280)
    record_property("seconds", time.monotonic() - began)
    assert page.inner_text("#count") == "20,000 of 20,000 completions"
    assert (page.locator(".entry").count(), page.locator(".policy").count()) == (4, 20)
    page.select_option("[name=sort]", "reward")
    page.select_option("[name=order]", "down")
    page.fill("[name=step-from]", "500")
    assert page.inner_text("#count") == "10,020 of 20,000 completions"
