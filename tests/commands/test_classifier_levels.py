"""A classifier needs images of two levels or more, in training and in validation, and of every level in training."""

import pytest

from ldm.commands.train_classifier import level_counts
from ldm.data.draft import Record
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError

TARGET = CovariateSchema.from_config({"diseased": {"kind": "categorical", "levels": ["no", "yes", "unsure"]}})[
    "diseased"
]


class Cohort:
    def __init__(self, **values):
        self.values = values

    def split(self, name):
        return [Record(f"{i}", f"{i}", {}, None, {"diseased": v}, name) for i, v in enumerate(self.values[name])]


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (["yes"] * 3, ["no", "yes"], "all 3 images of the train split are 'yes'"),
        (["yes", "no", "unsure"], ["no", "no", None], "all 2 images of the valid split are 'no'"),
        (["yes", "no"], [None], "all 0 images of the valid split are 'n/a'"),
        (["yes", "no", "no"], ["no", "yes"], "no training image is 'unsure'; take the level out"),
    ],
)
def test_a_list_of_one_class_is_refused(train, valid, message):
    with pytest.raises(LdmError, match=message):
        level_counts(Cohort(train=train, valid=valid), TARGET)


def test_images_without_a_level_are_not_counted():
    counts = level_counts(Cohort(train=["yes", "no", None, "no", "unsure"], valid=["no", "yes"]), TARGET)
    assert dict(counts) == {"yes": 1, "no": 2, "unsure": 1}
