"""What the rows of a table are measured with."""

from dataclasses import replace
from types import SimpleNamespace

from omegaconf import OmegaConf

from ldm.commands import compare
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema


def test_instruments_are_for_the_channels_that_models_generate(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(compare, "find_instruments", lambda sections, recipe, *_: given.append(recipe) or {})
    recipe = Preprocessing(2, None, channels=("T1",))
    datamodule = SimpleNamespace(
        preprocessing=replace(recipe, channels=("T1", "T2")),
        schema=CovariateSchema([]),
        cohort=SimpleNamespace(split_hash="0", records=[]),
    )
    network, config = SimpleNamespace(identity={"sha256": "0"}), OmegaConf.create({"data": {}, "seed": 0})
    compare.build_measure(config, datamodule, recipe, network, compare.HeldOut([], [], []), tmp_path)
    assert given == [recipe]
