"""Reward files import the files next to them, also if other directories have files of the same names."""

import dataclasses
import importlib
import itertools
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from uniapl.rewards.finding import find_function


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    """Every test starts with the same modules and paths."""
    modules, paths = dict(sys.modules), list(sys.path)
    yield
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]
    sys.path[:] = paths


def write(folder: Path, **files: str) -> None:
    """Python files; a double underscore separates folders: lib__util is lib/util.py."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def functions(tmp_path: Path, name: str = "f", **files: str) -> list[Callable[..., Any]]:
    """The function of two directories with the same files, in which NAME is replaced."""
    for folder in ("a", "b"):
        write(tmp_path / folder, **{k: text.replace("NAME", folder) for k, text in files.items()})
    return [find_function(f"{tmp_path / folder / 'mine.py'}:{name}") for folder in ("a", "b")]


STATEMENTS = [
    "from my_helper import VALUE",
    "import my_helper; VALUE = my_helper.VALUE",
    "import my_helper as h; VALUE = h.VALUE",
    "VALUE = __import__('my_helper').VALUE",
]


@pytest.mark.parametrize(
    ("statement", "late"),
    [("from my_helper import *", False), *itertools.product(STATEMENTS, (False, True))],
)
def test_each_file_gets_its_own_helper(statement: str, late: bool, tmp_path: Path) -> None:
    late_part, early = (statement, "") if late else ("", statement)
    mine = f"{early}\ndef f(completions):\n    {late_part}\n    return [VALUE]\n"
    first, second = functions(tmp_path, my_helper="VALUE = 'NAME'", mine=mine)
    assert (second([""]), first([""]), second([""])) == (["b"], ["a"], ["b"])


@pytest.mark.parametrize("init", [False, True])
def test_packages_with_and_without_init(init: bool, tmp_path: Path) -> None:
    inits = {"my_lib__sub____init__": "", "my_lib____init__": "from .sub import deep\nimport my_lib.top"}
    files = inits if init else {}
    first, second = functions(
        tmp_path,
        my_lib__sub__deep="from my_other import VALUE\nfrom ..top import TOP\nVALUE = VALUE + TOP",
        my_lib__top="TOP = 'NAME'",
        my_other="VALUE = 'NAME'",
        mine="import my_lib.sub.deep\nimport my_lib.sub.deep as deep\nfrom my_lib.sub import deep as same\n"
        "def f(completions):\n    assert deep is same\n    return [my_lib.sub.deep.VALUE]\n",
        **files,
    )
    assert (first([""]), second([""])) == (["aa"], ["bb"])


def test_helpers_of_helpers_and_their_late_imports(tmp_path: Path) -> None:
    """Only the second directory has loaded `my_common` when the first one's helper imports it."""
    first, second = functions(
        tmp_path,
        my_common="VALUE = 'NAME'",
        my_helper="def value():\n    import my_common\n    return my_common.VALUE\n",
        mine="import my_helper\ndef f(completions):\n    return [my_helper.value()]\n",
    )
    assert (second([""]), first([""])) == (["b"], ["a"])


def test_two_files_of_a_directory_share_their_helper(tmp_path: Path) -> None:
    write(tmp_path, my_helper="SEEN = []", one="from my_helper import SEEN\ndef f(x): return SEEN")
    write(tmp_path, two="import my_helper\ndef f(x): return my_helper.SEEN")
    assert find_function(f"{tmp_path}/one.py:f")([]) is find_function(f"{tmp_path}/two.py:f")([])
    assert find_function(f"{tmp_path}/one.py:f") is find_function(f"{tmp_path}/../{tmp_path.name}/one.py:f")


def test_installed_modules_and_those_of_python_stay_what_they_are(tmp_path: Path) -> None:
    """`yaml` is installed and imported; a file named like a module of Python does not replace it."""
    import yaml

    write(
        tmp_path,
        yaml="VALUE = 'mine'",
        colorsys="VALUE = 'mine'",
        mine="import yaml, colorsys, json\ndef f(x): return [yaml.VALUE, colorsys.rgb_to_hsv, json.dumps]",
    )
    (tmp_path / "numpy").mkdir()
    write(tmp_path, plain="import numpy\ndef f(x): return numpy.zeros(1).tolist()")
    import colorsys
    import json

    assert find_function(f"{tmp_path}/mine.py:f")([]) == ["mine", colorsys.rgb_to_hsv, json.dumps]
    assert find_function(f"{tmp_path}/plain.py:f")([]) == [0.0]
    assert sys.modules["yaml"] is yaml
    assert importlib.import_module("yaml") is yaml


def test_a_file_named_like_a_module_that_it_imports(tmp_path: Path) -> None:
    write(tmp_path, yaml="import yaml\ndef f(x): return yaml.safe_load('[1]')")
    assert find_function(f"{tmp_path}/yaml.py:f")([]) == [1]


def test_classes_are_pickled_copied_and_reloaded(tmp_path: Path) -> None:
    made = functions(
        tmp_path,
        my_types="from __future__ import annotations\nfrom dataclasses import dataclass\nimport typing\n"
        "@dataclass\nclass Score:\n    value: float = 1.0\n    name: typing.ClassVar[str] = 'NAME'\n",
        mine="from my_types import Score\nimport my_types\ndef f(x): return Score(), my_types\n",
    )
    for folder, function in zip("ab", made, strict=True):
        one, module = function([])
        assert one.name == folder
        assert pickle.loads(pickle.dumps(one)) == dataclasses.replace(one)
        assert [field.name for field in dataclasses.fields(one)] == ["value"]
        before = module.Score
        (tmp_path / folder / "my_types.py").write_text("Score = int\n# a file of another length\n")
        assert importlib.reload(module) is module
        assert (before.__name__, module.Score) == ("Score", int)


def test_helpers_of_a_single_file_work_in_processes_that_are_spawned(tmp_path: Path) -> None:
    write(tmp_path, my_pool_helper="def size(text):\n    return float(len(text))\n")
    write(
        tmp_path,
        mine="""
        import multiprocessing
        from my_pool_helper import size
        def f(completions):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.map(size, completions)
        """,
        # In another directory than the helper, which must not be found by chance.
        elsewhere__script=f"""
        if __name__ == "__main__":
            from uniapl.rewards.finding import find_function
            assert find_function({str(tmp_path / "mine.py") + ":f"!r})(["a", "bb"]) == [1.0, 2.0]
        """,
    )
    script = [sys.executable, str(tmp_path / "elsewhere" / "script.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_module_of_the_working_directory_and_a_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        mine = "from my_helper import VALUE\ndef f(x): return [VALUE]"
        write(tmp_path / folder, my_helper=f"VALUE = '{folder}'", my_module=mine)
    monkeypatch.chdir(tmp_path / "b")
    assert find_function(f"{tmp_path}/a/my_module.py:f")([]) == ["a"]
    assert find_function("my_module:f")([]) == ["b"]


def test_a_helper_that_fails_can_be_imported_after_it_is_repaired(tmp_path: Path) -> None:
    write(tmp_path, my_helper="VALUE = 1 / 0", mine="from my_helper import VALUE\ndef f(x): return [VALUE]")
    with pytest.raises(Exception, match="division by zero"):
        find_function(f"{tmp_path}/mine.py:f")
    write(tmp_path, my_helper="VALUE = 1  # repaired")
    assert find_function(f"{tmp_path}/mine.py:f")([]) == [1]
