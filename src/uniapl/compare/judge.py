"""An independent judge of closeness to the expert: cosine similarity of sentence embeddings."""

from collections.abc import Sequence
from typing import Any

from uniapl.compare.measures import Judge
from uniapl.errors import UsageError


def load_judge(name: str) -> Judge:
    """The judge with a sentence-transformers model, by its directory or Hub id.

    Raises:
        UsageError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--judge needs sentence-transformers: pip install 'uniapl[judge]'") from error
    try:
        model: Any = SentenceTransformer(name)
    except Exception as error:  # many kinds, from files and from the Hub
        raise UsageError(f"--judge: cannot load '{name}': {error}") from error

    def judge(texts: Sequence[str], experts: Sequence[str]) -> list[float]:
        ours, theirs = (model.encode(list(side), normalize_embeddings=True) for side in (texts, experts))
        return [float((a * b).sum()) for a, b in zip(ours, theirs, strict=True)]

    return judge
