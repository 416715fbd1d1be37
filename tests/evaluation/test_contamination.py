"""Overlap of prompts in scripts without spaces between words, and in other forms of the same text."""

# ruff: noqa: RUF001
import unicodedata

import pytest

from uniapl.evaluation.contamination import overlap

SENTENCES = {
    "chinese": "小明有五个苹果，他给了小红两个，又买了三个，现在他一共有几个苹果？",
    "japanese": "りんごが五個あります。三個食べました。そのあと二個買いました。いま何個ありますか？",
    "thai": "สมชายมีแอปเปิ้ลห้าลูก เขาให้สมหญิงสองลูก แล้วซื้อเพิ่มอีกสามลูก ตอนนี้เขามีแอปเปิ้ลกี่ลูก",
    "lao": "ສົມຊາຍມີໝາກໂປມຫ້າໜ່ວຍ ລາວເອົາໃຫ້ນ້ອງສອງໜ່ວຍ ຕອນນີ້ລາວມີໝາກໂປມຈັກໜ່ວຍ",
    "khmer": "សុខមានផ្លែប៉ោមប្រាំ គាត់ឲ្យប្អូនស្រីពីរ ហើយទិញបីទៀត តើឥឡូវគាត់មានផ្លែប៉ោមប៉ុន្មាន",
    "burmese": "မောင်မောင်တွင် ပန်းသီးငါးလုံးရှိသည်။ ညီမအား နှစ်လုံးပေးသည်။ ယခု ဘယ်နှစ်လုံးကျန်သနည်း။",
}
AROUND = {
    "chinese": ("请一步一步地回答下面的问题：", "只写一个数字。"),
    "japanese": ("次の質問に答えてください。", "数字だけを書いてください。"),
    "thai": ("จงตอบคำถามต่อไปนี้ ", " ตอบเป็นตัวเลขเท่านั้น"),
    "lao": ("ຈົ່ງຕອບຄຳຖາມ ", " ຕອບເປັນຕົວເລກ"),
    "khmer": ("សូមឆ្លើយសំណួរ ", " សរសេរតែលេខ"),
    "burmese": ("မေးခွန်းကို ဖြေပါ။ ", " ဂဏန်းသာ ရေးပါ။"),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_in_another_prompt_is_found(language: str) -> None:
    before, after = AROUND[language]
    sentence = SENTENCES[language]
    theirs = ["Name a river.", sentence]
    ours = [f"{before}{sentence}{after}", f"{before}{after}"]
    assert overlap(ours, theirs).ngram == {0: 1}
    assert overlap(ours, theirs).exact == {}
    assert overlap(theirs, ours).ngram == {1: 0}, "the same in the other direction"
    assert overlap([sentence], theirs).exact == {0: 1}


def test_thirteen_words_are_thirteen_chinese_characters_or_26_letters() -> None:
    chinese, kana = "天地玄黄宇宙洪荒日月盈昃辰", "いろはにほへとちりぬるをわかよたれそつねならむうゐ"
    assert (len(chinese), len(kana)) == (13, 25)
    kana += "の"
    assert overlap([f"海{chinese}川"], [f"山{chinese}石"]).ngram == {0: 0}
    assert overlap([f"海{chinese[1:]}川"], [f"山{chinese}石"]).ngram == {}
    assert overlap([f"海{kana}川"], [f"山{kana}石"]).ngram == {0: 0}
    assert overlap([f"海{kana[1:]}川"], [f"山{kana}石"]).ngram == {}
    mixed = "one two three 天地玄 いろはにほへと GPT-4 x"
    # 3 words, 3 characters, 7 letters and 3 words (gpt, 4, x): 12.5 words, so that one more word is needed.
    assert overlap([f"{mixed} y"], [f"海 {mixed} y"]).ngram == {0: 0}
    assert overlap([f"a {mixed} c d"], [f"b {mixed} d d"]).ngram == {}


def test_a_common_request_is_no_overlap() -> None:
    ours = ["次の質問に日本語で答えてください。山は何色ですか", "เขียนเกี่ยวกับประเทศไทย แม่น้ำ"]
    theirs = ["次の質問に日本語で答えてください。一番長い川は", "เขียนเกี่ยวกับประเทศไทย ภูเขา"]
    assert overlap(ours, theirs).ngram == {}


def test_forms_of_the_same_characters_are_equal() -> None:
    """Decomposed accents, full-width letters and digits, half-width kana."""
    composed = "Où est né l'élève ?"
    decomposed = unicodedata.normalize("NFD", composed)
    assert overlap([decomposed], [composed]).exact == {0: 0}
    assert overlap(["ＡＢＣ １２３ ｶﾞｷﾞ"], ["abc 123 ガギ"]).exact == {0: 0}
