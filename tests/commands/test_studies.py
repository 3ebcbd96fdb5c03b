"""Every study of this repository describes networks that fit each other and take a step, at its own sizes."""

from pathlib import Path

import pytest

from ldm.model.build import PIXELS
from tests.commands.meta import composed, step_of_first_stage, step_of_gan, step_of_second_stage, untrained

#: experiment -> image channels, and the size of images where the configuration leaves it to the cohort
STUDIES = {
    "brain_mri/coarse": (1, [80, 96, 80]),
    "brain_mri/from_simulated": (1, [80, 96, 80]),
    "brain_mri/long": (1, [80, 96, 80]),
    "brain_mri/scratch": (1, [80, 96, 80]),
    "brain_mri/simulated": (1, [80, 96, 80]),
    "demo/demo": (1, [48, 56, 48]),
    "demo_anomaly/demo": (4, None),
    "demo_anomaly/percentiles": (4, None),
    "hippocampus/finer": (1, [48, 64, 48]),
    "hippocampus/mask": (1, [48, 64, 48]),
    "hippocampus/ours": (1, [48, 64, 48]),
    "hippocampus/pixels": (1, [48, 64, 48]),
    "lgg_anomaly/pixels": (3, [64, 64]),
    "mednist_ldm/ablation/epsilon": (1, [64, 64]),
    "mednist_ldm/ablation/flow": (1, [64, 64]),
    "mednist_ldm/ablation/v_prediction": (1, [64, 64]),
    "mednist_ldm/class_conditional": (1, [64, 64]),
    "mednist_ldm/text": (1, [64, 64]),
    "mednist_ldm/unconditional": (1, [64, 64]),
    "mednist_vae/lecture": (1, [48, 48]),
    "stem/haar": (1, [48, 64, 48]),
    "stem/none": (1, [48, 64, 48]),
    "stem/space_to_depth": (1, [48, 64, 48]),
}


@pytest.mark.parametrize("study", STUDIES)
def test_both_stages_take_a_step(study, no_autocast, monkeypatch):
    config = composed(study)
    model, image_shape = untrained(config, *STUDIES[study])
    losses, module = step_of_second_stage(config, model, monkeypatch)
    assert losses.shape == (2,)
    assert all(parameter.grad is not None for parameter in module.network.parameters() if parameter.requires_grad)
    if config.vae.network.kind == PIXELS:
        return
    reconstruction, _, module = step_of_first_stage(config, image_shape)
    assert reconstruction.shape == (1, *image_shape)
    assert all(parameter.grad is not None for parameter in module.network.parameters())


def test_what_measures_is_trained_on_moved_crops_and_what_generates_is_not():
    ours, instruments = composed("hippocampus/ours"), composed("hippocampus/instruments", verb="train-segmenter")
    assert ours.data.augment.shift == 0 < instruments.data.augment.shift
    assert instruments.run_dir == str(Path(ours.data.instrument.path).parent)


def test_the_instruments_of_the_demo_are_where_training_writes_them():
    named = {one["kind"]: one["path"] for one in composed("demo/instruments").data.instrument}
    for kind in ("segmenter", "predictor"):
        run_dir = composed("demo/instruments", verb=f"train-{kind}").run_dir
        assert named[kind] == f"{run_dir}/model.safetensors"


@pytest.mark.parametrize("method", ["lsgan", "vaegan"])
@pytest.mark.parametrize("study", ["brain_mri", "hippocampus", "mednist_gan"])
def test_the_gans_beside_them_take_a_step(study, method, no_autocast):
    image_shape = {"brain_mri": (1, 80, 96, 80), "hippocampus": (1, 48, 64, 48), "mednist_gan": (1, 64, 64)}[study]
    images, module = step_of_gan(composed(f"{study}/{method}", verb="train-gan"), image_shape)
    assert images.shape == (2, *image_shape)
    for network in (module.network, module.discriminator):
        assert not [name for name, one in network.named_parameters() if one.grad is None and "null" not in name]
