"""Keys and values of rollouts that go on after a tool's result."""

from typing import NamedTuple

from torch import Tensor

from uniapl.types import TokenIds


class Cache(NamedTuple):
    """Keys and values of the first tokens of a row."""

    keys: Tensor
    """[layers, key heads, tokens, head_dim]"""
    values: Tensor
    """[layers, key heads, tokens, head_dim]"""


class RowCaches:
    """The caches of rollouts that may go on, by their token ids.

    A call of a sampler takes over what the call before has kept. A row that is not found is read again, so a
    sampler may keep as many as it wants, or none.
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: dict[TokenIds, Cache] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._kept)

    def keep(self, ids: TokenIds, cache: Cache) -> None:
        """Keep the cache of a row, of all its tokens but the last, which has not been read."""
        tokens = len(ids) - 1
        self._kept[ids] = Cache(cache.keys[:, :, :tokens], cache.values[:, :, :tokens])

    def take_over(self) -> "RowCaches":
        """Return what is kept, and keep nothing of it."""
        taken = RowCaches()
        taken._kept, self._kept = self._kept, {}
        return taken

    def find(self, ids: TokenIds) -> Cache | None:
        """The cache of the longest row with which these ids begin."""
        lengths = sorted({len(row) for row in self._kept if len(row) <= len(ids)}, reverse=True)
        rows = (ids[:length] for length in lengths)
        return next((self._kept[row] for row in rows if row in self._kept), None)
