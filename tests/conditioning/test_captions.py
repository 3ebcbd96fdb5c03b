"""Captions from covariates, and the words that a model knows of them."""

import pytest

from ldm.conditioning.captions import Caption
from ldm.conditioning.text import FIRST, LAST, UNKNOWN, WordPiece, own_vocabulary, read_vocabulary
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError

SCHEMA = CovariateSchema(
    [
        Covariate("age", "continuous", "years", (40.0, 80.0)),
        Covariate("sex", "categorical", levels=("F", "M")),
        Covariate("ventricles_mm3", "continuous", "mm3", (0.0, 100000.0)),
    ]
)
TEMPLATE = (
    "T1-weighted MRI of a [{age:.0f}-year-old ]{sex:woman|man}"
    "[ with {ventricles_mm3<20000:small|<60000:normal|enlarged} ventricles]"
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"age": 70.2, "sex": "F", "ventricles_mm3": 19999}, "a 70-year-old woman with small ventricles"),
        ({"age": "51", "sex": "M", "ventricles_mm3": 20000.0}, "a 51-year-old man with normal ventricles"),
        ({"age": None, "sex": "M", "ventricles_mm3": 1e6}, "a man with enlarged ventricles"),
        ({"sex": "F"}, "a woman"),
    ],
)
def test_a_row_becomes_a_sentence_and_what_is_missing_leaves_its_phrase_out(row, expected):
    assert Caption.parse(TEMPLATE, SCHEMA)(row) == f"T1-weighted MRI of {expected}"


def test_without_a_covariate_outside_all_brackets_there_is_no_caption():
    assert Caption.parse(TEMPLATE, SCHEMA)({"age": 70}) is None


def test_plain_fields_say_numbers_and_levels():
    assert Caption.parse("{sex}, {age}, {age:.1f}", SCHEMA)({"age": 70.25, "sex": "F"}) == "F, 70.25, 70.2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{aeg}", "no covariate 'aeg'. Did you mean 'age'"),
        ("{sex:woman}", "1 word.* for 2 levels; legal: one each, for F, M"),
        ("{sex<1:a|b}", "sex is categorical"),
        ("{age:x}", "age.* continuous; legal after the colon"),
        ("{age<60:old|<50:young|middle}", "60, 50 have to increase"),
        ("{age<60:young}", "a last word without a bound"),
        ("{age.__class__}", "is no field"),
        ("{age[0]}", "does not pair"),
        ("{age!r}", "is no field"),
        ("[a [{age}]]", "do not nest"),
        ("[{age}", "not closed"),
        ("{age", "does not pair"),
        ("", "needs a sentence"),
    ],
)
def test_what_is_no_template_is_refused_by_name(template, message):
    with pytest.raises(LdmError, match=message):
        Caption.parse(template, SCHEMA, "ldm.conditioners.text.caption")


def test_the_captions_own_words_are_whole_and_numbers_are_digits():
    tokenize = WordPiece(own_vocabulary(Caption.parse(TEMPLATE, SCHEMA).texts()))
    words = list(tokenize.numbers)

    def pieces(text):
        return [words[number] for number in tokenize(text)]

    assert pieces("a 70-Year-Old woman") == [FIRST, "a", "7", "##0", "-", "year", "-", "old", "woman", LAST]
    assert pieces("wide ventricles") == [FIRST, "w", "##i", "##d", "##e", "ventricles", LAST]
    assert UNKNOWN in pieces("\u4e00")


def test_a_vocabulary_is_read_or_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nmri\n##s\n")
    assert WordPiece(read_vocabulary(path))("MRIs") == [2, 4, 5, 3]
    with pytest.raises(LdmError, match=r"lacks \[CLS\], \[SEP\]"):
        WordPiece(["[PAD]", "[UNK]", "mri"])
    with pytest.raises(LdmError, match="no vocabulary"):
        read_vocabulary(tmp_path / "other.txt")
