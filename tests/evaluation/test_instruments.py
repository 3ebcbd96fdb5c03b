"""The instrument that a predictor is: it gives levels and values, and refuses what it was not trained for."""

import logging

import pytest
import torch

from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.instruments import OfAnotherSplit, find_instrument, find_instruments, instrument_hashes, merged
from tests.model.test_predictor import SCHEMA, predictor


@pytest.fixture
def made(tmp_path):
    """A predictor of age and sex from pictures of one channel, its file, and the section that names it."""
    made = predictor(in_channels=1)
    made.save(tmp_path / "model.safetensors")
    return made, {"kind": "predictor", "path": str(tmp_path / "model.safetensors"), "measures": ["sex"]}


def test_it_gives_the_most_probable_level_and_the_value_in_the_unit(made):
    made, config = made
    image = torch.rand(1, 12, 8).numpy()
    found = made.predict(image[None])
    measured = find_instrument({**config, "measures": None}, made.preprocessing, SCHEMA)(image)
    assert measured == {"age": found["age"].item(), "sex": "FM"[int(found["sex"][0, 1] > 0.5)]}
    assert find_instrument(config, made.preprocessing, SCHEMA)(image) == {"sex": measured["sex"]}


def test_without_its_file_nothing_is_measured(made, caplog):
    made, config = made
    with caplog.at_level(logging.WARNING):
        assert find_instrument({**config, "path": "nowhere.safetensors"}, made.preprocessing, SCHEMA) is None
    assert "no predictor nowhere.safetensors yet (ldm train-predictor)" in caplog.text


def test_another_split_is_warned_of_and_remembered(made, caplog):
    made, config = made
    own = find_instrument(config, made.preprocessing, SCHEMA, made.facts["split_sha256"])
    assert not caplog.text
    foreign = find_instrument(config, made.preprocessing, SCHEMA, "1" * 64)
    assert "trained on another split" in caplog.text
    assert isinstance(foreign, OfAnotherSplit)
    assert not isinstance(own, OfAnotherSplit)
    assert not isinstance(find_instrument(config, made.preprocessing, SCHEMA), OfAnotherSplit)
    image = torch.rand(1, 12, 8).numpy()
    assert foreign(image) == own(image)


def test_what_it_cannot_measure_is_refused(made):
    made, config = made
    with pytest.raises(LdmError, match="does not predict 'site'.*It predicts: age, sex"):
        find_instrument({**config, "measures": ["site"]}, made.preprocessing, SCHEMA)
    with pytest.raises(LdmError, match="a predictor takes a list of covariates"):
        find_instrument({**config, "measures": "sex"}, made.preprocessing, SCHEMA)
    with pytest.raises(LdmError, match="data.instrument.path is not set"):
        find_instrument({"kind": "predictor"}, made.preprocessing, SCHEMA)
    other = CovariateSchema([Covariate("sex", "categorical", levels=("F", "M", "X"))])
    with pytest.raises(LdmError, match="sex.levels"):
        find_instrument(config, made.preprocessing, other)
    with pytest.raises(LdmError, match="trained on images with channels"):
        find_instrument(config, predictor(in_channels=2).preprocessing, SCHEMA)


def test_an_instrument_that_adds_nothing_is_not_asked_again():
    asked = []

    def instrument(title, *names):
        return lambda image: asked.append(title) or dict.fromkeys(names, title)

    measure = merged({"a": instrument("a", "x"), "b": instrument("b", "x"), "c": instrument("c", "x", "y")})
    assert [measure(None), measure(None)] == [{"x": "a", "y": "c"}] * 2
    assert "".join(asked) == "abcac"


def test_several_instruments_are_a_list(made):
    made, config = made
    image = torch.rand(1, 12, 8).numpy()
    both = [config, {**config, "measures": ["age", "sex"]}, {**config, "path": "nowhere.safetensors"}]
    found = find_instruments(both, made.preprocessing, SCHEMA)
    assert list(found) == ["predictor", "predictor 2"]
    assert list(found["predictor"](image)) == ["sex"]
    assert merged(found)(image) == found["predictor 2"](image)
    assert list(find_instruments(config, made.preprocessing, SCHEMA)) == ["predictor"]  # one mapping, as before
    assert find_instruments(None, made.preprocessing, SCHEMA) == {}
    assert merged({}) is None
    assert instrument_hashes(both) == f"{made.sha256} {made.sha256}"
    assert instrument_hashes(None) is None
    with pytest.raises(LdmError, match="each instrument is a mapping"):
        find_instruments(["predictor"], made.preprocessing, SCHEMA)
