"""Work for both libraries from one seed: a model, prompts, completions of planned lengths, and rewards."""

import hashlib
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from uniapl.demo.recipe import MAX_COMPLETION_LENGTH
from uniapl.demo.task import make_task

disable_progress_bar()
PAD, EOS = 0, 1
DEMO = Path(str(files("uniapl.demo") / "base"))


def _trunk(hidden: int, layers: int, heads: int, **sizes: int) -> dict[str, int]:
    small = {"intermediate_size": hidden * 8 // 3, "num_key_value_heads": heads // 2, "head_dim": 64}
    trunk = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return trunk | small | sizes


TRUNKS = {
    "20m": _trunk(384, 5, 6),
    "thin": _trunk(256, 2, 4),
    "qwen3-0.6b": _trunk(1024, 28, 16, intermediate_size=3072, num_key_value_heads=8, head_dim=128),
    "qwen3-4b": _trunk(2560, 36, 32, intermediate_size=9728, num_key_value_heads=8, head_dim=128),
}
"""Sizes of Qwen3 models: "20m" has 20 M parameters at V = 32,000, "thin" is a small trunk for large
vocabularies, and the last two are the published models."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the work."""

    model: str = "20m"
    """"demo", or a key of TRUNKS: a Qwen3 with random weights."""
    prompts: int = 4
    generations: int = 8
    prompt_length: int = 128
    completion_length: int = 128
    """Maximum completion length."""
    spread: float = 0.6
    """Standard deviation of the log of completion lengths; their mean is 40 % of the maximum."""
    vocabulary: int = 32_000

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


SHAPES = {
    "demo": Shape(
        model="demo",
        prompts=12,
        prompt_length=MAX_COMPLETION_LENGTH,
        completion_length=MAX_COMPLETION_LENGTH,
        vocabulary=157,
    ),
    "20m": Shape(prompts=2),
}
"""The measured models and their default sizes."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Token ids of one step: the prompts, and a completion with its reward for each rollout."""

    shape: Shape
    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(completion) for completion in self.completions]


def planned_lengths(shape: Shape, count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths, as those of real completions, truncated at the maximum."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    location = math.log(0.4 * shape.completion_length) - shape.spread**2 / 2
    lengths = (location + shape.spread * normal).exp().round().clamp(1, shape.completion_length)
    return [int(length) for length in lengths]


def make_work(shape: Shape, seed: int = 0) -> Work:
    """Random prompts of equal length, and random completions that end with the end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(4, shape.vocabulary, (length,), generator=generator).tolist()

    completions = [[*ids(length - 1), EOS] for length in planned_lengths(shape, shape.rows, seed)]
    return Work(
        shape=shape,
        prompts=[ids(shape.prompt_length) for _ in range(shape.prompts)],
        completions=completions,
        rewards=[pseudo_random(" ".join(map(str, completion))) for completion in completions],
    )


def pseudo_random(text: str) -> float:
    """A reward in [0, 1) from the text's hash, so that different completions have different rewards."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def text_of(completion: Any) -> str:
    """Text of a completion; both libraries pass a list of messages if the prompt is a chat."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def random_reward(completions: list[Any], **_: Any) -> list[float]:
    """Reward function of the complete step, for both libraries."""
    return [pseudo_random(text_of(completion)) for completion in completions]


def data_rows(shape: Shape, count: int) -> list[dict[str, Any]]:
    """Rows for a run, each with a demonstration: prompts of the demo task, or random words."""
    if shape.model == "demo":
        task = make_task(prompts=count, demonstrations=count, held_out=1)
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in task.rows]
    work = make_work(replace(shape, prompts=count, generations=1), seed=1)
    return [
        {"prompt": words(prompt), "completion": words(completion[:-1])}
        for prompt, completion in zip(work.prompts, work.completions, strict=True)
    ]


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def save_model(
    shape: Shape, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Path:
    """Save the model, with weights drawn on the device, and its tokenizer to a directory."""
    if shape.model == "demo":
        # Use a copy, because runs write to the parent directory of the model.
        return Path(copytree(DEMO, folder, dirs_exist_ok=True))
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        **TRUNKS[shape.model],
    )
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{n}": n for n in range(3, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def load(folder: Path, device: str) -> tuple[PreTrainedModel, Any]:
    """Load the model in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def parse(parser: ArgumentParser) -> Namespace:
    """Add the arguments that all benchmarks share, parse the command line, and set the number of threads."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def chosen_shapes(parser: ArgumentParser) -> None:
    """Add arguments that select the models and change their sizes."""
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=[*SHAPES])
    for name in ("prompts", "generations", "prompt-length", "completion-length", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)


def shapes(options: Namespace) -> list[Shape]:
    """The selected models, with the sizes given on the command line."""
    names = ("prompts", "generations", "prompt_length", "completion_length", "vocabulary")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return [replace(SHAPES[name], **changes) for name in options.models]
