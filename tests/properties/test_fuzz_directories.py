"""Damaged model directories and checkpoints: exit 2 with the directory's name; nothing outside is read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from support.fuzzing import Said, assert_clear, json_values, say, small_recipe, tries
from support.tiny import letter_rows, save_model
from uniapl.training.checkpoint import directory as checkpoint

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def change(**values: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    *[
        (name, damage)
        for name in (CONFIG, TOKENIZER, SETTINGS, GENERATION, "model.safetensors")
        for damage in (Path.unlink, truncate, write(b"\xff\xfe"), write(b"null"), directory)
    ],
    (CONFIG, change(model_type="nonsense")),
    (CONFIG, change(model_type=None)),
    (CONFIG, change(hidden_size="32")),
    (CONFIG, change(num_hidden_layers=-1)),
    (CONFIG, change(num_hidden_layers=None)),
    (CONFIG, change(vocab_size=3)),
    (CONFIG, change(hidden_size=64)),
    (CONFIG, change(eos_token_id={"a": 1})),
    (CONFIG, change(max_position_embeddings="many")),
    (CONFIG, change(max_position_embeddings=-1)),
    (CONFIG, change(architectures=[3])),
    (CONFIG, change(architectures=["BertModel"], model_type="bert")),
    (TOKENIZER, change(model={})),
    (TOKENIZER, change(added_tokens=3)),
    (SETTINGS, change(chat_template="{% for")),
    (SETTINGS, change(chat_template=3)),
    (SETTINGS, change(eos_token=3)),
    (SETTINGS, change(eos_token="<nowhere>")),
    (SETTINGS, change(tokenizer_class="Nonsense")),
    (GENERATION, change(eos_token_id="one")),
    (GENERATION, change(eos_token_id=[[1]])),
    (GENERATION, change(max_new_tokens="many")),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and rows."""
    path = tmp_path_factory.mktemp("fuzz")
    save_model(path / "model", chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows(4)))
    return path


def run(verb: str, folder: Path, model: Path, *flags: str) -> Said:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(model, folder)))
    return say(verb, str(recipe), *flags)


@pytest.mark.parametrize("position", range(len(DAMAGES)))
def test_damaged_model_directories(position: int, folder: Path, tmp_path: Path) -> None:
    name, damage = DAMAGES[position]
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    damage(model / name)
    said = run("train", folder, model, "--output-dir", str(tmp_path / "run"))
    assert_clear(said, str(model), "tokenizer", "context of -1 tokens", "BertLMHeadModel")


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run of one step, with everything that a checkpoint can hold."""
    assert run("train", folder, folder / "model", *KL).code == 0
    (folder / "secret").write_text("nobody's business")
    return folder / "run"


KL = (
    *("--objective.beta", "0.1", "--objective.reference-step", "1", "--objective.lambda-controller", "pid"),
    *("--discriminator.kind", "bradley-terry"),
)


def resumed(folder: Path, content: Any, *, name: str = checkpoint.STATE) -> Said:
    """Go on from a checkpoint in which a file holds something else, sealed as if it was whole."""
    path = checkpoint.checkpoint_path(folder / "other", 1)
    shutil.rmtree(folder / "other", ignore_errors=True)

    def fill(directory: Path) -> None:
        shutil.copytree(checkpoint.checkpoint_path(folder / "run", 1), directory, dirs_exist_ok=True)
        (directory / checkpoint.MANIFEST).unlink()
        if name == checkpoint.STATE:
            (directory / name).write_text(json.dumps(content))

    checkpoint.write_directory(path, fill)
    if name == checkpoint.MANIFEST:
        (path / name).write_text(json.dumps(content))
    flags = ("--resume", "auto", "--max-steps", "2", "--output-dir", str(folder / "other"))
    return run("train", folder, folder / "model", *KL, *flags)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one in a place; MISSING takes it away."""
    if not path:
        return new
    items = dict(value.items() if isinstance(value, dict) else enumerate(value))
    items[path[0]] = put(items[path[0]], path[1:], new)
    items = {key: item for key, item in items.items() if item is not MISSING}
    return items if isinstance(value, dict) else list(items.values())


MISSING = object()
new_values = st.just(MISSING) | json_values | st.integers(-2, 99) | st.just([]) | st.just({})


@tries(20)
@given(draw=st.data())
def test_odd_states_at_resume(draw: st.DataObject, folder: Path, run_dir: Path) -> None:
    state = json.loads((checkpoint.checkpoint_path(run_dir, 1) / checkpoint.STATE).read_text())
    for _ in range(draw.draw(st.integers(1, 2))):
        path = draw.draw(st.sampled_from(places(state)))
        new = draw.draw(new_values)
        if path or new is not MISSING:
            state = put(state, path, new)
    assert_clear(resumed(folder, state), str(folder / "other"))


UNKNOWN = {"prompt_ids": [4], "demonstration_ids": [5, 10**6], "completions": [[6]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"stage": 1}, "stage 2 of 1"),
        ({"replay": MISSING}, "does not fit the recipe: KeyError: 'replay'"),
        ({"replay": [UNKNOWN]}, "its replay contains unknown token ids"),
        ({"stopping": {"best": None, "waited": 0, "reason": None, "more": 1}}, "does not fit the recipe"),
    ],
)
def test_states_that_are_refused(changes: dict[str, Any], message: str, folder: Path, run_dir: Path) -> None:
    state = json.loads((checkpoint.checkpoint_path(run_dir, 1) / checkpoint.STATE).read_text())
    changed = {key: value for key, value in (state | changes).items() if value is not MISSING}
    said = resumed(folder, changed)
    assert said.code == 2
    assert_clear(said, str(folder / "other"))
    assert message in said.err


file_names = st.sampled_from(
    [
        "../../secret",
        "../../../secret",
        "{folder}/secret",
        "/etc/hostname",
        "",
        ".",
        "x\0",
        "x" * 300,
        "\ud800",
    ]
)
entries = json_values | st.fixed_dictionaries({"bytes": json_values, "sha256": json_values})


@tries(10)
@given(change=st.dictionaries(file_names, entries, min_size=1, max_size=2) | json_values)
def test_odd_manifests_at_resume(change: Any, folder: Path, run_dir: Path) -> None:
    manifest = json.loads((checkpoint.checkpoint_path(run_dir, 1) / checkpoint.MANIFEST).read_text())
    if isinstance(change, dict):
        change = manifest | {name.replace("{folder}", str(folder)): value for name, value in change.items()}
    assert_clear(resumed(folder, change, name=checkpoint.MANIFEST), str(folder / "other"))


@pytest.mark.parametrize("name", ["../../../secret", "{folder}/secret"])
def test_a_manifest_does_not_lead_out_of_its_checkpoint(name: str, folder: Path, run_dir: Path) -> None:
    """Even a file with the right size and checksum is none of the checkpoint's."""
    name = name.replace("{folder}", str(folder))
    content = (folder / "secret").read_bytes()
    right = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads((checkpoint.checkpoint_path(run_dir, 1) / checkpoint.MANIFEST).read_text())
    said = resumed(folder, manifest | {name: right}, name=checkpoint.MANIFEST)
    assert said.code == 2
    assert f"{name}: not inside the directory" in said.out
    assert (checkpoint.checkpoint_path(folder / "other", 1) / name).resolve() == folder / "secret"


@pytest.mark.parametrize("line", ["", "\0\0", "null", '{"step": null}', "[" * 9000])
def test_damaged_logs_at_resume(line: str, folder: Path, tmp_path: Path, run_dir: Path) -> None:
    other = shutil.copytree(run_dir, tmp_path / "run")
    log = other / "metrics.jsonl"
    log.write_text(log.read_text() + line + "\n")
    flags = ("--resume", "auto", "--max-steps", "2", "--output-dir", str(other))
    said = run("train", folder, folder / "model", *KL, *flags)
    assert_clear(said, f"{log}: damaged line")
    assert said.code == (2 if line else 0)


@pytest.mark.parametrize("name", ["step-", "step-000001.bak"])
def test_other_folders_beside_checkpoints_are_left_alone(
    name: str, folder: Path, tmp_path: Path, run_dir: Path
) -> None:
    other = shutil.copytree(run_dir, tmp_path / "run")
    (other / "checkpoints" / name).mkdir()
    flags = ("--resume", "auto", "--max-steps", "2", "--output-dir", str(other))
    assert run("train", folder, folder / "model", *KL, *flags).code == 0
    assert (other / "checkpoints" / name).is_dir()


def test_a_manifest_of_nothing_makes_no_checkpoint(folder: Path, run_dir: Path) -> None:
    """Nor does one that vouches for other files than the state."""
    said = resumed(folder, {}, name=checkpoint.MANIFEST)
    assert_clear(said, "every checkpoint in")
    assert said.code == 2
    path = checkpoint.checkpoint_path(folder / "other", 1)
    (path / checkpoint.STATE).unlink()
    weights = (path / "model.safetensors").read_bytes()
    entry = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    (path / checkpoint.MANIFEST).write_text(json.dumps({"model.safetensors": entry}))
    said = run("train", folder, folder / "model", "--resume", "auto", "--output-dir", str(folder / "other"))
    assert_clear(said, "every checkpoint in")
    assert said.code == 2
    assert f"{checkpoint.STATE}: missing" in said.out
