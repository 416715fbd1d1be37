"""Imports of the files next to a reward file, as in a script: a directory's own files come first.

Python keeps one module per name, so the second of two directories with a `helper.py` would get the first
one's. Files loaded here have their own `__import__`, which knows their directory. A module has its usual name
if no other file has it, so that its objects can be pickled for other processes, and another name otherwise.
Modules of the standard library are never replaced.
"""

import builtins
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


def load_file(path: Path) -> ModuleType:
    """Import a Python file once, under a name of its own.

    Raises:
        FileNotFoundError: It does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    name = f"uniapl_reward_{_digest(path)}"
    if name not in _FINDER.own:
        _FINDER.own[name] = (path.parent, importlib.util.spec_from_file_location(name, path))
    return importlib.import_module(name)


def load_module(name: str, directory: Path) -> ModuleType:
    """Import a module by its name, also from `directory`."""
    top, dot, rest = name.partition(".")
    return importlib.import_module(f"{_own_name(directory, top) or top}{dot}{rest}")


class _Finder(MetaPathFinder):
    """Finds the modules of reward files' directories by the names that they have here."""

    def __init__(self) -> None:
        self.own: dict[str, tuple[Path, ModuleSpec | None]] = {}
        """Module without a parent -> its directory and how it is found there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of such a module, or of a module in such a package; None for all others."""
        directory, spec = self.own.get(fullname.partition(".")[0], (None, None))
        if directory is None:
            return None
        if path is not None:
            spec = _fixed(PathFinder.find_spec(fullname, path, target))
        if spec is None or not (spec.loader is None or isinstance(spec.loader, SourceFileLoader)):
            return spec
        if spec.origin is None:
            return _namespace(fullname, spec)
        return importlib.util.spec_from_file_location(
            fullname,
            spec.origin,
            loader=_Loader(fullname, spec.origin, directory),
            submodule_search_locations=spec.submodule_search_locations,
        )


class _Loader(SourceFileLoader):
    """Runs a file with an `__import__` that looks in its directory first."""

    def __init__(self, fullname: str, path: str, directory: Path) -> None:
        super().__init__(fullname, path)
        self.directory = directory

    def exec_module(self, module: ModuleType) -> None:
        """Run the file; its functions keep this `__import__`, also for imports that run later."""
        own_import = functools.partial(_import, self.directory)
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": own_import}
        super().exec_module(module)


_FINDER = _Finder()
sys.meta_path.insert(0, _FINDER)


def _import(
    directory: Path,
    name: str,
    globals: dict[str, Any] | None = None,
    locals: dict[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__` of the files of a directory."""
    top, dot, rest = name.partition(".")
    own = None if level else _own_name(directory, top, (globals or {}).get("__file__"))
    if own is None or own == top:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = importlib.import_module(f"{own}{dot}{rest}")
    if not fromlist:
        return sys.modules[own]
    return builtins.__import__(module.__name__, globals, locals, fromlist, 0)


def _own_name(directory: Path, top: str, importer: str | None = None) -> str | None:
    """The name here of the directory's module `top`; None if it has none, or if it is the importing file."""
    if top in sys.stdlib_module_names:
        return None
    spec = _fixed(PathFinder.find_spec(top, [str(directory)]))
    if spec is None or not (spec.loader is None or isinstance(spec.loader, SourceFileLoader)):
        return None
    if importer is not None and spec.origin == importer and spec.submodule_search_locations is None:
        return None  # A package's __init__.py may import the package's modules by their full names.
    renamed = f"{top}_{_digest(directory)}"
    for name in (top, renamed):
        if _FINDER.own.get(name, (None, None))[0] == directory:
            return name
    other = _importable(top)
    if spec.loader is None and other is not None and other.origin is not None:
        return None  # A directory without __init__.py is a module only if no other module has the name.
    name = top if other is None or _places(other) == _places(spec) else renamed
    _FINDER.own[name] = (directory, spec)
    return name


def _importable(name: str) -> ModuleSpec | None:
    """What `import name` finds outside reward files."""
    if name in sys.modules:
        return sys.modules[name].__spec__ or ModuleSpec(name, None, origin="unknown")
    return importlib.util.find_spec(name)


def _places(spec: ModuleSpec) -> tuple[str | None, list[str]]:
    return spec.origin, list(spec.submodule_search_locations or ())


def _fixed(spec: ModuleSpec | None) -> ModuleSpec | None:
    """The specification, with the paths of now: those of a directory without __init__.py follow sys.path."""
    return spec if spec is None or spec.origin is not None else _namespace(spec.name, spec)


def _namespace(fullname: str, spec: ModuleSpec) -> ModuleSpec:
    found = ModuleSpec(fullname, None, is_package=True)
    found.submodule_search_locations = list(spec.submodule_search_locations or ())
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:16]
