"""What README, CONTRIBUTING and docs/ tell people to write and to run: run here on a small model.

A block that is neither run, nor read as rows or settings, nor exempted by name fails.
"""

import ast
import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.documents import ROOT, TEMPLATE, block, code_blocks, read_rows
from support.runs import lines
from support.tiny import save_model
from uniapl import cli
from uniapl.config import Config
from uniapl.config.resolve import load_recipe, resolve
from uniapl.demo.options import demo_options
from uniapl.demo.recipe import RECIPE, TOOLS_RECIPE
from uniapl.tools.functions import tool_of

LEFT_OUT = {
    "docs/log.md": "dated records of what was run once, with the figures that came out",
    "docs/api.md": "signatures and examples of docstrings, written by `make api`",
    "docs/configuration.md": "the same",
}
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if str(path.relative_to(ROOT)) not in LEFT_OUT
]

# Blocks that nobody runs: first line -> what they are.
SHOWN = {
    "examples/minimal_loop.py  the complete method in one file; start here": "the repository's tree",
    "runs/primes/": "a run's files",
    "checkpoints/step-000050/": "a checkpoint's files",
    "data[(rows)] --> prompts & demonstrations": "the picture of a step",
    '{"base": name, "final": path, "answers": {"expert" and "policy": {"count": 64, "base" and "final":': (
        "the form of analysis.json"
    ),
    "L = mu S_sft / N_sft  +  (1 - mu) w_r S_rl / N_rl  +  lambda S_adv / N_adv  +  beta S_kl / N_kl": (
        "the objective"
    ),
}
# Commands that are not run: how they begin -> why. Their targets, extras, flags and recipes are looked up.
EXEMPT = {
    "make ": "the virtual environment alone takes minutes",
    "pip install": "the index",
    "python examples/": "the tests of the examples run them",
    "git clone": "there is no one address",
    "cd uniapl": "goes with git clone",
    "export VLLM": "goes with vllm serve",
    "vllm serve": "a GPU; tests/with_vllm has a server on a CPU",
    "python benchmarks/": "minutes each",
    "uniapl collect": "an endpoint; tests/collect/test_collect.py has one",
    "uniapl demo": "minutes; tests/demo/test_demo.py runs it small",
    "uniapl compare": "minutes to hours; tests/compare runs it small",
    "uniapl report runs/primes --figures": "half a minute; tests/report/test_report.py draws them",
    "uniapl report runs/before": "a comparison's page; tests/compare writes one",
    "uniapl evaluate runs/primes/final --lm-eval-tasks": "benchmarks of the Hub",
    "accelerate launch": "several processes; tests/integration/test_sharded_runs.py has two",
    "torchrun": "several processes; tests/integration/test_train.py has two",
    "uniapl evaluate runs/primes/final --sampler vllm": "a server; tests/cli/test_evaluate_served.py has one",
    "uniapl export runs/primes --push-to-hub": "the Hub; tests/cli/test_export_to_hub.py has a stand-in",
    "uniapl check recipes/qwen3": "Qwen's shape; tests/test_recipes.py checks all of them",
    "uniapl train recipes/qwen3": "a GPU",
}
# What makes the others small, and keeps them off the Hub.
SMALL = {
    "train": "--max-steps 2 --rollout.max-completion-length 4",
    "check": "--max-steps 2 --rollout.max-completion-length 4",
    "evaluate": "--max-completion-length 4 --overwrite",
    "compose": "--benchmarks ifeval=ifeval.jsonl ifbench=ifeval.jsonl",
    "pretrain-discriminator": "--steps 1 --batch-size 2 --max-completion-length 4",
    "report": "",
    "chat": "--max-new-tokens 4",
    "export": "",
    "init": "",
    "recipes": "",
}


def kind(text: str) -> str:
    """What a block is, by how it begins; "unknown" where nobody has said."""
    first = text.splitlines()[0]
    if first in SHOWN:
        return "shown"
    if re.match(r"(uniapl|make|pip|python|git|torchrun|accelerate|vllm|cd|source|export) ", first):
        return "commands"
    if first.startswith('{"'):
        return "rows"
    if re.match(r"(def|import|from|class) ", first):
        return "python"
    read = yaml.safe_load(text)
    return "settings" if isinstance(read, dict) and read.keys() <= Config.model_fields.keys() else "unknown"


def of_kind(document: Path, wanted: str) -> list[str]:
    return [text for text in code_blocks(document) if kind(text) == wanted]


def commands(document: Path) -> list[list[str]]:
    """Each as its words, without what stands behind #."""
    text = "".join(of_kind(document, "commands")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def exempt(words: list[str]) -> bool:
    return any(" ".join(words).startswith(beginning) for beginning in EXEMPT)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the README has come to: rows, a reward, a recipe, a model by its name, two runs."""
    here = tmp_path_factory.mktemp("workshop")
    save_model(here / "Qwen" / "Qwen3-0.6B", chat_template=TEMPLATE)
    for name in ("CHECKPOINT", "BACKBONE", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(here / "Qwen" / "Qwen3-0.6B", here / name)
    rows = block("README.md", '{"prompt"')
    for name in ("train.jsonl", "held_out.jsonl", "prompts.jsonl"):
        (here / name).write_text(rows)
    ifeval = {
        "key": 1,
        "prompt": "Name a bird.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    (here / "ifeval.jsonl").write_text(json.dumps(ifeval) + "\n")
    (here / "my_reward.py").write_text(block("README.md", "def is_prime"))
    (here / "recipe.yaml").write_text(block("README.md", "model:"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert cli.run(["train", "recipe.yaml", *SMALL["train"].split()]) == 0
        assert cli.run(["demo", "--write", "runs/task"]) == 0
    for name in ("grpo", "demo", "demo-grpo"):
        shutil.copytree(here / "runs" / "primes", here / "runs" / name)
    return here


def runnable(words: list[str]) -> list[str]:
    verb, *rest = words[1:]
    small = SMALL[verb].split()
    if verb == "evaluate":
        rest = ["ifeval=ifeval.jsonl" if word == "ifeval" else word for word in rest]
    if verb in ("train", "check") and not {"--resume", "--overwrite"} & set(rest):
        small += ["--overwrite"]
    return [verb, *rest, *small]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_run_or_exempt(
    document: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a prime above 30.\n"))
    unknown = [text for text in code_blocks(document) if kind(text) == "unknown"]
    assert not unknown, "neither commands, nor Python, rows or settings, nor in SHOWN"
    for words in commands(document):
        if exempt(words):
            continue
        assert words[0] == "uniapl", f"neither run nor exempt: {words}"
        try:
            code = cli.run(runnable(words))
        except SystemExit as end:
            code = end.code
        assert not code, f"{' '.join(words)}: exit code {code}"


def test_what_is_exempt_names_targets_extras_flags_and_recipes_that_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used: set[str] = set()
    for words in [words for document in DOCUMENTS for words in commands(document) if exempt(words)]:
        line = " ".join(words)
        used |= {beginning for beginning in EXEMPT if line.startswith(beginning)}
        if words[0] == "make":
            assert words[1] in targets, line
        elif line.startswith("pip install"):
            for extra in re.findall(r"\[(\w+)\]", line):
                assert extra in extras, line
        elif line.startswith("uniapl demo"):
            options, flags = demo_options(words[2:])
            resolve(TOOLS_RECIPE if options.task == "tools" else RECIPE, flags)
        elif line.startswith("accelerate launch"):
            assert (ROOT / words[words.index("--config_file") + 1]).is_file(), line
        elif any(word.startswith("recipes/") for word in words):
            at = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
            resolve(load_recipe(ROOT / words[at]), words[at + 1 :])
    assert used == EXEMPT.keys(), "exemptions that nothing needs any more"


def test_inline_extras_and_shown_blocks_are_still_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(document.read_text() for document in DOCUMENTS)
    named = re.findall(r'pip install -e "\.\[(\w+)\]"', text)
    assert set(named) <= extras.keys()
    firsts = {each.splitlines()[0] for document in DOCUMENTS for each in code_blocks(document)}
    assert SHOWN.keys() <= firsts


@pytest.mark.parametrize(
    "text",
    [text for document in DOCUMENTS for text in of_kind(document, "settings")],
    ids=lambda t: t.split()[0],
)
def test_settings_are_accepted(text: str) -> None:
    resolve(yaml.safe_load(text))


def test_rows_have_a_prompt() -> None:
    texts = [text for document in DOCUMENTS for text in of_kind(document, "rows")]
    assert len(texts) >= 3
    assert all(row.keys() & {"prompt", "messages"} for text in texts for row in read_rows(text))


def test_python_blocks_do_what_the_text_says(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    found: dict[str, Any] = {"rows": read_rows(block("README.md", '{"prompt"'))}
    blocks = [text for document in DOCUMENTS for text in of_kind(document, "python")]
    for text in sorted(blocks, key=lambda text: text.startswith("import")):
        small = text.replace('"max_steps": 200', '"max_steps": 1, "rollout": {"max_completion_length": 4}')
        ast.parse(text)
        exec(small, found)
    assert found["is_prime"](["11", "12", "x"], [100, 100, 100]) == [1.0, 0.0, 0.0]
    assert found["short"](["one two", [{"content": "word " * 21}]]) == [1.0, 0.0]
    assert found["has_word"](["a cat", "a dog", "a cow"], ["cat", "cat", None]) == [1.0, 0.0, None]
    assert found["right"]([[{"content": "82"}], [{"content": "8"}]], ["82", "82"]) == [1.0, 0.0]
    assert tool_of(found["lookup"]).name == "lookup"
    assert found["result"].steps == 1


def test_the_readme_s_rows_teach_what_it_says(workshop: Path) -> None:
    """Both rows feed RL, and the one with a completion feeds SFT."""
    last = lines(workshop / "runs" / "primes" / "metrics.jsonl")[-1]
    assert last["tokens/sft"] > 0
    assert {line["row"] for line in lines(workshop / "runs" / "primes" / "completions.jsonl")} == {1, 2}


@functools.cache
def anchors(document: Path) -> set[str]:
    """As GitHub and Zensical make them of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_hold(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", document.read_text()):
        there = (document.parent / target) if target else document
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.resolve()), f"{target}#{anchor}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. It is built from a copy, because Zensical writes next to its configuration."""
    pytest.importorskip("zensical")
    here = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", here / "docs")
    shutil.copy(ROOT / "mkdocs.yml", here)
    (here / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return here / "build" / "site"


def test_the_site_asks_no_other_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?([^\" >]+)", page.read_text())
        assert loaded, page.name
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name
        assert 'class="mermaid"' not in page.read_text(), "the theme would fetch a script to draw it"


def test_the_navigation_has_every_page_once() -> None:
    """Zensical reports neither a page that is left out nor one that does not exist."""
    listed = re.findall(r"- .*?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.browser
def test_the_search_works_from_disk(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "decisions" / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("max_expert_gap")
        page.wait_for_selector("a[href*='constraint.html']")
        browser.close()
    assert not [address for address in asked if not address.startswith(("file:", "about:", "data:", "blob:"))]


def test_the_published_tables_are_those_of_the_runs() -> None:
    path = ROOT / "benchmarks" / "wrong_rewards.py"
    spec = importlib.util.spec_from_file_location("wrong_rewards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "choosing-a-method.md").read_text()
    for reward, table in module.tables().items():
        assert table in page, reward
