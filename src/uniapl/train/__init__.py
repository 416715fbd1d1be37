"""The training loop and its parts: the only package that knows accelerate and processes.

The package itself can be called: `uniapl.train(config)` is `uniapl.train.api.train(config)`. Python binds a
sub-package's name on its parent as soon as it is imported, so the function and the package have to be one.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """:func:`uniapl.train.api.train`."""
        from uniapl.train.api import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
