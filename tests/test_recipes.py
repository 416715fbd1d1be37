"""The recipes: Qwen3's on directories of those models' shapes without weights, GSM8K's and SmolLM2's."""

import json
import math
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from support.benchmark_data import DATA, GSM8K, STAND_INS, on_stand_ins_and_real_data, rows
from support.documents import ROOT, TEMPLATE, block, read_rows
from support.tiny import LETTERS, SMALL, make_tokenizer
from uniapl import cli
from uniapl.config.resolve import resolve
from uniapl.rewards.base import build_rewarder
from uniapl.rewards.finding import find_function
from uniapl.types import Example

COMMON = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, int]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
QWEN_GSM8K = "recipes/gsm8k/qwen3-0.6b.yaml"
RECIPES = sorted((ROOT / "recipes").glob("qwen3-*.yaml"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models by their names, and the rows that the recipes speak of."""
    here = tmp_path_factory.mktemp("recipes")
    for name, shape in SHAPES.items():
        Qwen3Config(**COMMON, **shape).save_pretrained(here / "Qwen" / name)
        make_tokenizer(chat_template=TEMPLATE).save_pretrained(here / "Qwen" / name)
    [row] = read_rows(block("docs/gpus.md", '{"prompt"'))
    written = [row | {"prompt": f"{row['prompt']} {letter}"} for letter in LETTERS]
    (here / "data").mkdir()
    path = here / "data" / "prompts_with_demonstrations.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in written))
    return here


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_check_accepts_it(
    recipe: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    # A minute for each on a slow core; tests/training/preflight/test_memory.py compares it with runs.
    monkeypatch.setattr("uniapl.cli.check._memory", lambda *_: {"text": ""})
    # The directories hold configurations without weights.
    monkeypatch.setattr("uniapl.cli.check.check_policy", lambda *_: True)
    assert cli.run(["check", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["with_demonstration"] == report["examples"] == len(LETTERS)
    assert report["rewards"] == {"instruction_following": len(LETTERS)}
    [stage] = report["stages"]
    eight = recipe.stem.endswith("8gpu")
    assert stage["rollouts per step"] == (1024 if eight else 256)
    assert stage["demonstrations per step"] == (128 if eight else 64)
    assert not report["left_out"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(recipe: Path) -> None:
    evident = ("model_name_or_path", "path", "prompt_format")
    values = [line.strip() for line in recipe.read_text().splitlines() if re.match(r"  \w+: +[^ #]", line)]
    assert len(values) > 12
    for line in values:
        assert line.startswith(evident) or re.search(r"# \w", line), line


def byte_model(path: Path) -> Path:
    """A tiny chat model that reads every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE.replace("<|im_end|>", "<eos>")
    fast.save_pretrained(path)
    small: dict[str, Any] = SMALL | {"vocab_size": len(vocabulary), "max_position_embeddings": 4096}
    AutoModelForCausalLM.from_config(Qwen3Config(**small, tie_word_embeddings=True)).save_pretrained(path)
    return path


@pytest.mark.case(18)
@on_stand_ins_and_real_data
def test_gsm8k_with_qwen3(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The solutions are demonstrations and the reward's column, from a file and in the form of the Hub."""
    data = benchmarks / GSM8K
    if not data.is_file():
        pytest.skip(f"{data} does not exist")
    solutions = {number: row["answer"] for number, row in enumerate(rows(data), start=1)}
    questions = {number: row["question"] for number, row in enumerate(rows(data), start=1)}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("uniapl.cli.check._memory", lambda *_: {"text": ""})
    flags = ["--model.model-name-or-path", str(byte_model(tmp_path / "model")), "--optim.bf16", "False"]
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("---\nconfigs: [{config_name: main, data_files: train.jsonl}]\n---\n")
    (hub / "train.jsonl").write_bytes(data.read_bytes())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for path in (data, hub):
        assert cli.run(["check", QWEN_GSM8K, *flags, f"--data.path={path}", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["examples"] == report["with_demonstration"] == len(solutions)
        assert report["rewards"] == {"exact_match": len(solutions)}
        assert questions[1] in report["preview"]["text"].split("[[")[0]
        assert f"[[{solutions[1]}<eos>]]" in report["preview"]["text"]
    answers = [*solutions.values()]
    assert find_function("exact_match")(answers, answer=answers) == [1.0] * len(answers)
    small = "--batching.prompts-per-step 2 --batching.demonstrations-per-step 2 --rollout.num-generations 2"
    flags += [*small.split(), "--rollout.max-completion-length", "8", "--max-steps", "2"]
    run = tmp_path / "run"
    assert cli.run(["train", QWEN_GSM8K, *flags, f"--data.path={data}", f"--output-dir={run}"]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["rewards/exact_match/mean"] for m in metrics] == [0.0, 0.0]
    assert all(m["tokens/sft"] > 100 and m["tokens/rl"] > 0 for m in metrics), "both columns are used"
    logged = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(logged) == 4
    for line in logged:
        assert line["prompt"] == questions[line["row"]]
        assert line["demonstration"] == solutions[line["row"]]


def prepare_gsm8k(train: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Run recipes/gsm8k/prepare.py; the rows for training."""
    words = ["prepare.py", "--train", str(train), "--test", str(train), "--output-dir", str(build)]
    monkeypatch.setattr("sys.argv", words)
    assert runpy.run_path("recipes/gsm8k/prepare.py")["main"]() == 0
    return rows(build / "train.jsonl")


def score_by_recipe(written: list[dict[str, str]], completions: list[str]) -> list[float | None]:
    """The rewards of completions, one for each row, by the configuration of recipes/gsm8k/recipe.yaml."""
    config = resolve(yaml.safe_load(Path("recipes/gsm8k/recipe.yaml").read_text())).config
    rewarder = build_rewarder(config.rewards)
    examples = [
        Example(
            row=n, prompt="", prompt_ids=(), demonstration=None, demonstration_ids=None, columns=dict(row)
        )
        for n, row in enumerate(written)
    ]
    assert rewarder.check_rows(examples) == []
    outcomes = rewarder.score(examples, completions, [()] * len(completions))
    return rewarder.combine(outcomes, len(completions))


@on_stand_ins_and_real_data
def test_gsm8k_with_smollm2s_recipe(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All demonstrations pass the recipe's reward, nearly equal ones do not, and a run scores completions."""
    pytest.importorskip("math_verify")
    monkeypatch.chdir(ROOT)
    data = benchmarks / GSM8K
    written = prepare_gsm8k(data, tmp_path / "build", monkeypatch)
    answers = [row["answer"] for row in rows(data)]
    if benchmarks == STAND_INS:
        assert written[2]["completion"] == (
            "It builds 3 * 8 = 24 houses.\nThen it has 1250 + 24 = 1274 houses.\nThe answer is \\boxed{1274}."
        )
        assert written[3]["solution"] == "-5"
    demonstrations = [row["completion"] for row in written]
    assert len(demonstrations) == len(answers)
    assert score_by_recipe(written, demonstrations) == [1.0] * len(answers)
    # 172 in place of 72, 1-5 in place of -5; GSM8K's own form is no LaTeX.
    wrong = [text.replace("\\boxed{", "\\boxed{1") for text in demonstrations]
    assert score_by_recipe(written, wrong) == [0.0] * len(answers)
    unboxed = [f"The answer is {row['solution']}." for row in written[:3]]
    assert score_by_recipe(written[:3], unboxed) == [0.0] * 3
    monkeypatch.setattr("uniapl.cli.check._memory", lambda *_: {"text": ""})
    flags = ["--model.model-name-or-path", str(byte_model(tmp_path / "model")), "--optim.bf16", "False"]
    flags += [
        "--data.path",
        str(tmp_path / "build" / "train.jsonl"),
        "--data.max-demonstration-length",
        "2048",
    ]
    capsys.readouterr()
    assert cli.run(["check", "recipes/gsm8k/recipe.yaml", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rewards"] == {"accuracy_reward": len(answers)}
    assert report["with_demonstration"] == len(answers)


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct: the directory UNIAPL_TEST_SMOLLM2, or the copy in the Hub's cache."""
    if given := os.environ.get("UNIAPL_TEST_SMOLLM2"):
        return Path(given)
    try:
        return Path(snapshot_download("HuggingFaceTB/SmolLM2-135M-Instruct", local_files_only=True))
    except (OSError, ValueError):
        return None


@pytest.mark.slow
def test_smollm2_learns_gsm8k_for_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the recipe on the model that it names: a cold start and two steps with rollouts."""
    pytest.importorskip("math_verify")
    if (model := smollm2()) is None:
        pytest.skip(
            "SmolLM2-135M-Instruct is not in the Hub's cache; set UNIAPL_TEST_SMOLLM2 to its directory"
        )
    monkeypatch.chdir(ROOT)
    data = DATA / GSM8K if (DATA / GSM8K).is_file() else STAND_INS / GSM8K
    written = prepare_gsm8k(data, tmp_path / "build", monkeypatch)
    small = "--max-steps 3 --batching.prompts-per-step 1 --batching.demonstrations-per-step 2"
    small += " --rollout.num-generations 4 --rollout.max-completion-length 64 --optim.bf16 False"
    flags = ["--model.model-name-or-path", str(model), "--data.path", str(tmp_path / "build" / "train.jsonl")]
    flags += small.split()
    run = tmp_path / "run"
    assert cli.run(["train", "recipes/gsm8k/recipe.yaml", *flags, f"--output-dir={run}"]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert math.isfinite(m["loss"])
        assert m["skipped"] == 0
        # The solutions are plain English arithmetic: between 0.1 and 3 nats per token for this model.
        assert 0.1 < m["sft/nll"] < 3
        assert m["tokens/sft"] > 50
    groups = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert [group["step"] for group in groups] == [2, 3]
    for group, m in zip(groups, metrics[1:], strict=True):
        own = [written[group["row"] - 1]] * 4
        rewards = score_by_recipe(own, [one["text"] for one in group["completions"]])
        assert [one["reward"] for one in group["completions"]] == rewards
        assert {*rewards} <= {0.0, 1.0}
        assert m["rewards/accuracy_reward/none_rate"] == m["rewards/accuracy_reward/error_rate"] == 0
        assert m["rewards/accuracy_reward/mean"] == sum(reward == 1 for reward in rewards) / 4


def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No question is in two of the files that are made from answers, and both recipes can use them."""
    answers = [
        {
            "instruction": f"Name river number {n} of the land.",
            "output": f"River {n}, which is long, is the Umber.",
        }
        for n in range(90)
    ]
    answers += [{"instruction": "Tell all.", "output": "word " * 46}, {"instruction": "Why?", "output": None}]
    answers += [{**answer, "output": "It is the Ember."} for answer in answers[:90]]  # repeated questions
    source = tmp_path / "answers.json"
    source.write_text(json.dumps(answers))
    (tmp_path / "empty.jsonl").write_text('{"prompt": "Another subject."}\n')
    benchmarks = [f"{name}={tmp_path / 'empty.jsonl'}" for name in ("ifeval", "ifbench")]
    build = tmp_path / "build"
    prepare = runpy.run_path("recipes/smollm2/prepare.py")
    words = ["prepare.py", str(source), "--output-dir", str(build), "--benchmarks", *benchmarks]
    monkeypatch.setattr("sys.argv", words)
    assert prepare["main"]() == 0
    parts = {part: rows(build / f"{part}.jsonl") for part in ("held_out", "validation", "train")}
    assert {part: len({row["prompt"][:25] for row in own}) for part, own in parts.items()} == {
        "held_out": 60,
        "validation": 20,
        "train": 10,
    }
    assert "90 questions" in capsys.readouterr().out
    monkeypatch.setattr("uniapl.cli.check._memory", lambda *_: {"text": ""})
    model = byte_model(tmp_path / "model")
    flags = ["--model.model-name-or-path", str(model), "--data.path", str(build / "train.jsonl")]
    flags += ["--evaluation.suites", str(build / "held_out.jsonl"), "--data.max-demonstration-length", "400"]
    for name in ("recipe", "gameable"):
        assert cli.run(["check", f"recipes/smollm2/{name}.yaml", *flags, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["with_demonstration"] == report["examples"] == len(parts["train"])


def test_too_few_answers_for_smollm2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, build = tmp_path / "answers.json", tmp_path / "build"
    source.write_text(json.dumps([{"prompt": f"Name river {n}.", "completion": "Umber."} for n in range(80)]))
    monkeypatch.setattr("sys.argv", ["prepare.py", str(source), "--output-dir", str(build)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("recipes/smollm2/prepare.py")["main"]()
    assert end.value.code == 2
    assert "has 80 distinct questions with short answers, and the three files need at least 81" in (
        capsys.readouterr().err
    )
    assert not build.exists()


def test_the_measures_of_smollm2() -> None:
    measures = runpy.run_path("recipes/smollm2/rewards.py")
    prompts = ["Name the largest ocean. No commas. Lower case."] * 3
    ids = [["punctuation:no_comma", "change_case:english_lowercase"]] * 3
    texts = ["the pacific", "The Pacific", "The Pacific, no commas lower case"]
    given = {"instruction_id_list": ids, "kwargs": [[{}, {}]] * 3}
    assert measures["followed"](prompts, texts, **given) == [1.0, 0.5, 0.0]
    assert measures["all_followed"](prompts, texts, **given) == [1.0, 0.0, 0.0]
    assert measures["first_followed"](prompts, texts, **given) == [1.0, 1.0, 0.0]
    assert measures["words"](["one two", "word " * 40, "word " * 41, ""]) == [0.05, 1.0, 1.0, 0.0]
    # "no commas lower" and "commas lower case" of four; the first text has no three words.
    assert measures["copied"](prompts, texts) == [0.0, 0.0, 0.5]
