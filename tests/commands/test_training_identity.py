"""What a finished training is continued with, and what a second stage may stand on, mean what they meant."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from ldm.commands.posteriors import augment_key, same_cohort
from ldm.data.labels import LabelClasses
from ldm.errors import LdmError
from ldm.model.file import read_header
from ldm.model.first_stage import FirstStage
from ldm.training.fit import read_checkpoint

LABELS = LabelClasses.from_config({"tumour": 1})
IMAGE = "data.image={a: 'a_{participant_id}.png', b: 'b_{participant_id}.png'}"
SETTINGS = (
    "data=nifti",
    "data.name=made",
    "data.root=made",
    "data.spatial_dims=2",
    "data.labels='labels_{participant_id}.png'",
    "data.intensity={kind: window, lower: 0, upper: 255}",
    "data.split.fractions={train: 0.6, valid: 0.4, test: 0}",
    "data.num_workers=0",
    "vae.network.channels=[16,16]",
    "ldm.network.channels=[16,32]",
    "ldm.network.attention_levels=[false,false]",
    "ldm.network.norm_num_groups=4",
    "segmenter.network.channels=[8,16]",
    "trainer=cpu",
    "trainer.max_steps=1",
)


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures of two channels, with squares of the label values 1 and 2."""
    (tmp_path / "made").mkdir()
    rng, labels = np.random.default_rng(0), np.zeros((16, 16), np.uint8)
    labels[2:8, 2:8], labels[9:14, 9:14] = 1, 2
    for i in range(10):
        for name, picture in (("a", 90 * labels), ("b", 60 * labels)):
            noisy = picture + rng.integers(0, 40, labels.shape).astype(np.uint8)
            PIL.Image.fromarray(noisy).save(tmp_path / f"made/{name}_s{i}.png")
        PIL.Image.fromarray(labels).save(tmp_path / f"made/labels_s{i}.png")
    table = ["participant_id", *(f"s{i}" for i in range(10))]
    (tmp_path / "made/participants.tsv").write_text("\n".join(table) + "\n")


@pytest.mark.slow
def test_a_trained_segmenter_does_not_get_other_meanings(ldm, pictures, tmp_path):
    names = "data.label_names={one: 1, two: 2}"
    asked = ("train-segmenter", *SETTINGS)
    code, text = ldm(*asked, IMAGE, names)
    assert not code, text
    described = (tmp_path / "runs/made/segmenter/config.yaml").read_text()
    for image, other, name in (
        (IMAGE, "data.label_names={one: 2, two: 1}", "labels is"),
        (IMAGE, "data.label_names={two: 2, one: 1}", "labels is"),
        ("data.image={b: 'b_{participant_id}.png', a: 'a_{participant_id}.png'}", names, "preprocessing is"),
    ):
        code, text = ldm(*asked, image, other)
        assert code, other
        assert name in text, text
    code, text = ldm(*asked, IMAGE, names, "data.intensity.upper=200")
    assert code
    assert "preprocessing is" in text
    assert (tmp_path / "runs/made/segmenter/config.yaml").read_text() == described  # of the run, not of what is refused
    code, text = ldm(*asked, IMAGE, names)
    assert not code, text
    assert "Already trained" in text


@pytest.mark.slow
def test_a_first_stage_of_masks_is_of_their_values(ldm, pictures, tmp_path):
    asked = (*SETTINGS, IMAGE, "ldm=segmentation", "ldm.val_samples=0")
    code, text = ldm("train-vae", *asked, "data.label_names={tumour: 1}")
    assert not code, text
    code, text = ldm("train-vae", *asked, "data.label_names={tumour: 2}")
    assert code
    assert "labels is [['tumour', [2]]] now, was [['tumour', [1]]]" in text
    assert read_header("runs/made/vae/model.safetensors")["target"]["labels"] == {"tumour": [1]}
    code, text = ldm("train-ldm", *asked, "data.label_names={tumour: 2}")
    assert code
    assert "masks of other label values" in text
    code, text = ldm("train-ldm", *asked, "data.label_names={tumour: 1}", "data.split.seed=1")
    assert code
    assert "another split of the cohort 'made'" in text
    assert read_header("runs/made/vae/model.safetensors")["split_sha256"] in text
    start = "vae.init_from=runs/made/vae/model.safetensors"
    code, text = ldm("train-vae", *asked, "data.label_names={tumour: 1}", "data.split.seed=1", start, "run_dir=fold")
    assert code
    assert f"{start} was trained on another split of the cohort 'made'" in text


@pytest.mark.slow
def test_masks_whose_classes_stand_in_another_order_are_encoded_anew(ldm, pictures, tmp_path):
    settings = [one for one in SETTINGS if not one.startswith("vae.")]
    asked = ("train-ldm", *settings, IMAGE, "vae=identity", "ldm=segmentation", "ldm.val_samples=0")
    for number, names in enumerate(("{one: 1, two: 2}", "{two: 2, one: 1}", "{one: 1, two: 2}")):
        code, text = ldm(*asked, f"data.label_names={names}", f"run_dir=run{number}")
        assert not code, text
    assert len([one for one in (tmp_path / "runs/made/latents").iterdir() if one.is_dir()]) == 4  # 2 splits, 2 orders


def first_stage(**facts):
    return FirstStage(torch.nn.Identity(), {}, None, facts=facts)


def test_a_first_stage_has_not_seen_what_is_held_out():
    cohort = SimpleNamespace(name="made", split_hash="b" * 64)
    with pytest.raises(LdmError, match=f"first_stage=vae.safetensors.*split_sha256 {'a' * 64}, now {'b' * 64}"):
        same_cohort(first_stage(cohort="made", split_sha256="a" * 64), cohort, None, "vae.safetensors")
    for facts in (
        {"cohort": "made", "split_sha256": "b" * 64},
        {"cohort": "other", "split_sha256": "a" * 64},
        {"cohort": "made", "split_sha256": None},  # imported
        {},
    ):
        same_cohort(first_stage(**facts), cohort, LABELS, "vae.safetensors")


def test_a_first_stage_knows_the_values_of_its_masks_unless_it_is_old():
    cohort = SimpleNamespace(name="made", split_hash="b" * 64)
    facts = {"cohort": "made", "split_sha256": "b" * 64}
    same_cohort(first_stage(**facts), cohort, LABELS, "vae.safetensors")
    same_cohort(first_stage(**facts, target={"labels": {"tumour": [1]}}), cohort, LABELS, "vae.safetensors")
    with pytest.raises(LdmError, match="masks of other label values"):
        same_cohort(first_stage(**facts, target={"labels": {"tumour": [2]}}), cohort, LABELS, "vae.safetensors")


def test_a_checkpoint_from_before_a_field_was_kept_is_continued(tmp_path):
    torch.save({"ldm": {"identity": {"network": 1}}}, tmp_path / "last.ckpt")
    read_checkpoint(tmp_path / "last.ckpt", {"network": 1, "labels": LABELS.meaning})
    with pytest.raises(LdmError, match="network is 2 now, was 1"):
        read_checkpoint(tmp_path / "last.ckpt", {"network": 2, "labels": LABELS.meaning})
    with pytest.raises(LdmError, match="views is 1 now, was None"):
        read_checkpoint(tmp_path / "last.ckpt", {"network": 1, "views": 1})


def test_a_setting_that_an_earlier_version_did_not_have_may_be_off(tmp_path):
    network = {"channels": [16, 32]}
    torch.save({"ldm": {"identity": {"network": {"denoiser": network}}}}, tmp_path / "last.ckpt")
    read_checkpoint(tmp_path / "last.ckpt", {"network": {"denoiser": {**network, "dropout": 0.0}}})
    for other in ({**network, "dropout": 0.1}, {"channels": [16, 64], "dropout": 0.0}, {"dropout": 0.0}):
        with pytest.raises(LdmError, match="holds a run with another configuration"):
            read_checkpoint(tmp_path / "last.ckpt", {"network": {"denoiser": other}})


def test_a_cache_from_before_sequences_could_be_missing_is_still_the_one():
    before = {"flip_axes": [1], "scale": 0.1, "shift": 0}
    assert augment_key(before | {"missing": None, "missing_share": 0}) == before
    on = {"missing": {"T1": "FLAIR"}, "missing_share": 0.3}
    assert augment_key(before | on) == before | on
