"""Token ids of completions: those of the whole text, and never cut inside the text."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import uniapl
from support.runs import recipe, train, write_recipe
from support.tiny import make_tokenizer, save_model
from uniapl import cli
from uniapl.config import DataConfig
from uniapl.config.resolve import resolve
from uniapl.data.rows import Dataset, tokenize_rows
from uniapl.data.tokenization import (
    EndsEarlyError,
    encode_completion,
    encode_continuation,
    ordinary_tokens,
)
from uniapl.models.loading import ModelSource, load_stop_ids
from uniapl.training.given import Given
from uniapl.training.preflight.load import load_inputs

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "he said yes, she says no. A poem: yes, yes!\n\nhello world? user assistant 12 345",
    "yes no yes no",
]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a family, trained on a few words: byte-level BPE, or with SentencePiece's word mark."""
    symbols = sorted({*"".join(CORPUS), *map(chr, range(33, 127)), "▁"})
    bpe: dict[str, Any] = {"vocab_size": 420, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **bpe)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=SPECIAL,
            unk_token="<unk>",
            initial_alphabet=symbols,
            show_progress=False,
        )
    elif kind == "normalizer":  # as the tokenizer.json of Llama 2 and Mistral writes the word mark
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # pyright: ignore[reportArgumentType]
        )
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # pyright: ignore[reportArgumentType]
        )
        trainer = trainers.BpeTrainer(initial_alphabet=symbols, **bpe)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        backend.decoder = decoders.Metaspace(prepend_scheme=kind)
        trainer = trainers.BpeTrainer(initial_alphabet=symbols, **bpe)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        clean_up_tokenization_spaces=False,
    )


def with_marks(tokenizer: PreTrainedTokenizerFast, marks: str) -> PreTrainedTokenizerFast:
    """Let the tokenizer put BOS before every text, and EOS after it if `marks` has both."""
    backend: Any = tokenizer.backend_tokenizer
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single=marks, special_tokens=special)
    return tokenizer


def dataset(
    tokenizer: Any, *rows: dict[str, Any], stop: tuple[str, ...] = (), template: str | None = None
) -> Dataset:
    tokenizer.chat_template = template
    stop_ids = set(tokenizer.convert_tokens_to_ids(list(stop)))
    return tokenize_rows(enumerate(rows, start=1), tokenizer, DataConfig(), stop_ids=stop_ids)


FAMILIES = ("byte-level", "unigram", "normalizer", "first", "always", "never")
PROMPTS = ("he said", "he said ", "A poem:\n", "A poem:\n\n", "yes, ", "12", "he said <|im_end|>", "h")
TEXTS = (
    "yes",
    " yes",
    "\nyes no",
    "\n",
    "345",
    "ello world",
    "!",
    "es, yes!\n\n A poem: no.",
    "<|im_start|>no",
)


@pytest.mark.parametrize("marks", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_are_the_ids_of_the_whole_text(family: str, marks: str) -> None:
    """Where the prompt's ids are not their beginning, prompt and completion still decode to the text."""
    tokenizer = with_marks(trained(family), marks)
    end = tokenizer.eos_token_id
    same = 0
    for prompt in PROMPTS:
        for text in TEXTS:
            row = {"prompt": prompt, "completion": text, "rejected": text}
            if not text.strip():
                row = {"prompt": prompt, "completion": "yes", "rejected": text}
            (example,) = dataset(tokenizer, row).examples
            assert example.rejected_ids is not None
            whole = [token for token in tokenizer(prompt + text).input_ids if token != end]
            got = [*example.prompt_ids, *example.rejected_ids]
            if tuple(whole[: len(example.prompt_ids)]) == example.prompt_ids:
                same += 1
                assert got == [*whole, end], (prompt, text)
            else:
                assert tokenizer.decode(got[:-1]) == tokenizer.decode(whole), (prompt, text)
            if text.strip():
                assert example.demonstration_ids == example.rejected_ids
    assert same > len(PROMPTS) * len(TEXTS) / 2


@pytest.mark.case(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_chats_get_the_ids_of_the_whole_text(family: str) -> None:
    tokenizer = trained(family)
    user = {"role": "user", "content": "hello"}
    for template, end in ((ROLES, "</s>"), (CHATML, "<|im_end|>")):
        rows = [
            {"prompt": [user], "chosen": "yes", "rejected": "no"},
            {"messages": [user, {"role": "assistant", "content": "yes"}]},
        ]
        for example in dataset(tokenizer, *rows, stop=(end,), template=template).examples:
            for ids, text in ((example.demonstration_ids, "yes"), (example.rejected_ids, "no")):
                if ids is None:
                    continue
                turns = [user, {"role": "assistant", "content": text}]
                whole = str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip("\n")
                assert [*example.prompt_ids, *ids] == tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.case(5)
def test_a_completion_has_no_word_mark_after_a_line_break() -> None:
    tokenizer = trained("first")
    (example,) = dataset(
        tokenizer, {"prompt": [{"role": "user", "content": "no"}], "completion": "yes"}, template=ROLES
    ).examples
    tokens = tokenizer.convert_ids_to_tokens(list(example.demonstration_ids or ()))
    assert "".join(tokens) == "yes</s>"
    assert tokenizer.convert_ids_to_tokens(list(encode_continuation("yes", tokenizer)))[0][0] == "y"


@pytest.mark.case(3)
def test_an_end_token_of_ordinary_text_cuts_nothing() -> None:
    """Llama's class has the end token 2 by default, which is a quotation mark here."""
    tokenizer = make_tokenizer()
    comma = id_of(",", tokenizer)
    rows = [{"prompt": "a", "completion": text} for text in ("he, she", "he she", "he,", "a,, \n")]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "x, y"}]
    found = tokenize_rows(enumerate(rows, start=1), tokenizer, DataConfig(), stop_ids=[comma])
    assert [tokenizer.decode(list(e.demonstration_ids or ())) for e in found.examples] == [
        "he she<eos>",
        "he,",
    ]
    reason = "continues after the end token ',', which is not a special token"
    assert found.left_out == {f"demonstration {reason}": (1, 4), f"rejected completion {reason}": (5,)}
    with pytest.raises(uniapl.UsageError, match=r"no usable row: demonstration continues after .*: 1 rows"):
        tokenize_rows([(1, rows[0])], tokenizer, DataConfig(), stop_ids=[comma])


@pytest.mark.case(4)
def test_an_end_token_inside_the_answer_leaves_the_row_out() -> None:
    tokenizer = trained("byte-level")
    user = {"role": "user", "content": "How does ChatML work?"}
    answers = [
        "Each turn ends with <|im_end|> and then the next begins.",
        "The mark is <|im_end|>",
        "no marks",
        "<|im_end|> <|im_start|>",
        "<|im_end|>\n\n<|im_end|> yes",
    ]
    rows: list[dict[str, Any]] = [{"prompt": [user], "completion": text} for text in answers]
    rows += [{"messages": [user, {"role": "assistant", "content": answers[0]}]}]
    rows += [{"prompt": [user], "chosen": "fine", "rejected": answers[0]}]
    rows += [{"prompt": [user], "chosen": answers[0], "rejected": "fine"}]
    found = dataset(tokenizer, *rows, stop=("<|im_end|>",), template=CHATML)
    assert [example.row for example in found.examples] == [2, 3]
    kept = [tokenizer.decode(list(e.demonstration_ids or ())) for e in found.examples]
    assert kept == ["The mark is <|im_end|>", "no marks<|im_end|>"]
    reason = "continues after the end token '<|im_end|>'"
    assert found.left_out == {
        f"demonstration {reason}": (1, 4, 5, 6, 8),
        f"rejected completion {reason}": (7,),
    }
    plain = [{"prompt": "a", "completion": text} for text in ("b</s> c", "b</s>", "b</s>\n")]
    found = dataset(tokenizer, *plain)
    assert [tokenizer.decode(list(e.demonstration_ids or ())) for e in found.examples] == ["b</s>"] * 2
    assert found.left_out == {"demonstration continues after the end token '</s>'": (1,)}


@pytest.mark.parametrize(
    "after", ["", "\n", "<|im_start|>", "\nnext:\n", "</s>\n", " fin <|im_end|>"], ids=repr
)
def test_text_that_a_template_writes_after_the_turn_is_not_the_demonstration(after: str) -> None:
    template = CHATML.replace("<|im_end|>\n", f"<|im_end|>{after}")
    rows = [
        {"prompt": [{"role": "user", "content": "no"}], "completion": text}
        for text in ("yes ", "yes <|im_end|> no", "yes <|im_end|>")
    ]
    tokenizer = trained("byte-level")
    found = dataset(tokenizer, *rows, stop=("<|im_end|>",), template=template)
    kept = [tokenizer.decode(list(e.demonstration_ids or ())) for e in found.examples]
    assert kept == ["yes <|im_end|>", "yes <|im_end|>"]
    assert list(found.left_out.values()) == [(2,)]


def test_an_answer_that_the_template_changed_is_judged_by_its_special_tokens() -> None:
    """The answer, for example one whose thought was moved, is not in the text as it is in the data."""
    tokenizer = trained("byte-level")
    end = id_of("<|im_end|>", tokenizer)
    ids = encode_completion("no<|im_end|><|im_start|>\n", tokenizer, {end}, answer="yes")
    assert (ids[-1], ids.count(end)) == (end, 1)
    with pytest.raises(EndsEarlyError, match="continues after the end token"):
        encode_completion("no <|im_end|> no<|im_end|>", tokenizer, {end}, answer="yes")


def id_of(token: str, tokenizer: Any) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def write_llama(path: Path, **config: Any) -> Path:
    """A model directory whose configuration has these values and no `eos_token_id` of its own."""
    save_model(path, family="llama")
    values = json.loads((path / "config.json").read_text())
    del values["eos_token_id"]
    (path / "config.json").write_text(json.dumps(values | config))
    (path / "generation_config.json").unlink()
    return path


@pytest.mark.case(3)
def test_a_default_end_token_of_ordinary_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_llama(tmp_path / "model")
    assert LlamaConfig().eos_token_id == 2
    source = ModelSource(base=str(path))
    tokenizer = make_tokenizer()
    # <unk> is token 2 and special: no demonstration holds it.
    config = AutoConfig.from_pretrained(path)
    assert load_stop_ids(source, config, tokenizer) == {1, 2}
    config.eos_token_id = [1, id_of("t", tokenizer)]
    with pytest.raises(uniapl.UsageError, match=r"end token 23 \('t'\).*eos_token_id in its config.json"):
        load_stop_ids(source, config, tokenizer)
    config.eos_token_id = [1, 60, 100_000]
    assert load_stop_ids(source, config, tokenizer) == {1, 60, 100_000}, "no text has these ids"
    write_llama(tmp_path / "other", eos_token_id=23)
    rows = [{"prompt": "a", "completion": "he said that it is"}]
    recipe_path = write_recipe(tmp_path, tmp_path / "other", rows, method="sft", max_steps=1)
    assert cli.run(["train", str(recipe_path)]) == 2
    assert "end token 23 ('t')" in " ".join(capsys.readouterr().err.split())


def test_an_end_token_of_ordinary_text_in_the_generation_configuration_is_noted(
    model_dir: Path, tmp_path: Path
) -> None:
    """It may be deliberate: a base model that is to write one line."""
    path = save_model(tmp_path / "model")
    newline = id_of("\n", make_tokenizer())
    GenerationConfig(eos_token_id=[1, newline]).save_pretrained(path)
    resolved = resolve(recipe(path, tmp_path / "run", method="sft"))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b\nc"}]
    inputs = load_inputs(resolved, [resolved], Given(train_dataset=rows))
    assert inputs.stop_ids == {1, newline}
    assert [len(example.demonstration_ids or ()) for example in inputs.dataset.examples] == [2]
    assert any(f"the end token {newline} ('\\n')" in note for note in inputs.notes)
    usual = resolve(recipe(model_dir, tmp_path / "run", method="sft"))
    assert load_inputs(usual, [usual], Given(train_dataset=rows)).notes == ()


def test_added_and_special_tokens_are_not_ordinary() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end>"])
    end = id_of("<end>", tokenizer)
    assert ordinary_tokens([end, 0, 1, 3, 9, end + 1], tokenizer) == [9]


def test_left_out_rows_are_counted_in_a_run(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("b", "c", "d<eos>e", "<eos>e")]
    train(
        recipe(model_dir, tmp_path / "run", method="sft", max_steps=1),
        train_dataset=rows,
        reward_functions=[],
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    reason = "demonstration continues after the end token '<eos>'"
    assert manifest["data"]["left_out"] == {reason: 2}
