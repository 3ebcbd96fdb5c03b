"""What ``ldm segment`` says of the images it is given, before it draws and when it measures."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.commands import segment
from ldm.errors import LdmError

SETTINGS = {
    "members": 1,
    "batch_size": 1,
    "table": "table.tsv",
    "labels": None,
    "slices": None,
    "split": None,
    "seed": 0,
    "beside": None,
}


class Preprocessing:
    """Cannot read files with ``bad`` in their names."""

    spatial_dims = 2

    def load(self, record):
        (file,) = record.images.values()
        if "bad" in file:
            raise LdmError(f"{file}: is constant.")
        return None, None


SOURCE = SimpleNamespace(preprocessing=Preprocessing(), channels=("T1",), facts={"members": 1})


def test_all_unreadable_images_are_named_before_the_first_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.tsv").write_text("participant_id\tfile\na\tbad_1.png\nb\tgood.png\nc\tbad_2.png\n")
    monkeypatch.setattr(segment, "find_source", lambda config: SOURCE)
    config = OmegaConf.create({**SETTINGS, "images": "{file}", "run_dir": "out", "evaluate": False})
    with pytest.raises(LdmError, match=r"2 of 3 images .*\n'a': .*bad_1.png.*\n'c': .*bad_2.png"):
        segment.run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("column", "unit"), [("subject", "patient"), ("other", "image")])
def test_the_numbers_say_whose_they_are(tmp_path, monkeypatch, column, unit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.tsv").write_text(f"participant_id\t{column}\na\tp\nb\tp\n")
    monkeypatch.setattr(segment, "evaluate", lambda *_: {})
    for name, made in (("differences", {}), ("report", "report.html"), ("verdict", ())):
        monkeypatch.setattr(segment, name, lambda *_, made=made: made)
    segment.measure(OmegaConf.create({**SETTINGS, "images": "{file}"}), SOURCE, [], tmp_path, {})
    assert json.loads((tmp_path / segment.METRICS).read_text())["unit"] == unit
