"""Every option of every group composes, and what differs in training takes a step."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.commands.main import VERBS, conf_dir
from ldm.conditioning.covariates import MODES
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.model.file import read_header
from ldm.model.latent_diffusion import LatentDiffusionModel

OPTIONS = sorted(
    f"{file.parent.relative_to(conf_dir())}={file.stem}"
    for group in (
        "data",
        "vae",
        "ldm",
        "gan",
        "schedule",
        "segmenter",
        "predictor",
        "matcher",
        "classifier",
        "trainer",
        "logger",
    )
    for file in (conf_dir() / group).glob("*.yaml")
    if file.stem != "base"
)
STUDIES = sorted(
    f"experiment={file.relative_to(conf_dir() / 'experiment').with_suffix('')}"
    for file in (conf_dir() / "experiment").rglob("*.yaml")
)


@pytest.mark.parametrize(
    ("verbs", "options"),
    [(VERBS, ()), *((("train-ldm", "evaluate"), (option,)) for option in (*OPTIONS, *STUDIES))],
    ids=lambda value: value[0] if value and len(value) == 1 else "",
)
def test_everything_composes(verbs, options):
    """All verbs, and all options with two of them: a verb's own file adds to what all share."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for verb in verbs:
            config = compose(verb, [*options, "data.root=somewhere"])
            OmegaConf.to_container(config.trainer, resolve=True)
            OmegaConf.to_container(config.ldm, resolve=True)
            OmegaConf.to_container(config.gan, resolve=True)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory, cohort_root):
    """A first stage of the small cohort, trained for one step."""
    import os
    import sys

    from ldm.commands.main import main
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("first")
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = [
        "ldm",
        "train-vae",
        f"data.root={cohort_root}",
        "data.n=30",
        "data.spacing_mm=8.0",
        *TINY,
        f"runs_dir={folder}",
        "trainer.max_steps=1",
    ]
    try:
        main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        *[(f"ldm.condition.mode={mode}",) for mode in (*MODES, "none")],
        *[(f"ldm.prediction_type={name}", "ldm.loss.weighting=min_snr") for name in PREDICTION_TYPES],
        ("schedule=flow", "ldm.prediction_type=flow", "ldm.schedule.shift=resolution", "ldm.sampling.sampler=heun"),
        ("schedule=edm", "ldm.prediction_type=edm", "ldm.sampling.sampler=dpmpp_2m"),
        ("schedule=sigmoid", "ldm.schedule.rescale_zero_terminal_snr=true", "ldm.sampling.guidance_rescale=0.7"),
        (
            "ldm.learned_variance=true",
            "ldm.sampling={sampler: ddpm, options: {variance: learned}, guidance_scale: {age: 2.0}}",
            "ldm.sampling.guidance_interval=[0.2,5.0]",
        ),
        ("ldm.schedule={num_train_timesteps: 100, beta_schedule: cosine, beta_start: null, beta_end: null}",),
        ("ldm.latents={variants: 2, dtype: float32, labels: true}", "data.augment={scale: 0.05, flip_axes: [0]}"),
        ("ldm.ema_decays=[0.99,0.05]", "ldm.optimizer.accumulate=2", "trainer.precision=bf16-mixed"),
        ("logger=csv",),
        ("logger=tensorboard",),
    ],
    ids=str,
)
def test_the_second_stage_takes_a_step(ldm, tiny, first_stage, overrides):
    code, text = ldm("train-ldm", *tiny, f"runs_dir={first_stage}", "run_dir=run", "trainer.max_steps=1", *overrides)
    assert not code, text
    assert "Validation loss" in text
    if "ldm.ema_decays=[0.99,0.05]" in overrides:  # a model file each
        first, second = (read_header(f"run/{name}.safetensors") for name in ("model", "model-ema0.05"))
        assert (first["ema_decay"], second["ema_decay"]) == (0.99, 0.05)
        assert first["tensors_sha256"] != second["tensors_sha256"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("schedule=flow",), "'v_prediction' does not go with schedule 'flow'"),
        (("ldm.schedule.rescale_zero_terminal_snr=true", "ldm.prediction_type=epsilon"), "zero terminal SNR"),
        (("schedule=edm", "ldm.prediction_type=edm", "ldm.learned_variance=true"), "needs a discrete schedule"),
        (("ldm.sampling.options={variance: learned}", "ldm.sampling.sampler=ddpm"), "needs ldm.learned_variance=true"),
        (("ldm.sampling.sampler=dpmpp",), "Did you mean 'dpmpp_2m'"),
        (("schedule=flwo",), "Did you mean 'flow'"),
    ],
    ids=str,
)
def test_impossible_diffusion_is_refused_before_anything_is_read(ldm, overrides, message):
    code, text = ldm("train-ldm", *overrides)
    assert code
    assert message in text


@pytest.mark.parametrize("verb", ["train-vae", "train-ldm", "train-gan"])
def test_nobody_learns_to_generate_sequences_that_are_missing(ldm, verb):
    code, text = ldm(verb, "data.augment.missing={T1: FLAIR}", "data.augment.missing_share=0.1")
    assert code
    assert "data.augment.missing replaces images by others" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("vae.network.stem=space_to_depth", "vae.loss.reconstruction=l2"),
        ("vae.network.stem=none", "vae.network.attention_levels=[false,true]"),
        ("vae.patch_size=[16,16,16]", "vae.optimizer.accumulate=2"),
        (
            "vae.loss.adversarial_weight=0.1",
            "vae.loss.adversarial_start=0",
            "vae.loss.adversarial_adaptive=true",
            "vae.discriminator.channels=8",
            "vae.discriminator.num_layers_d=1",
        ),
        ("data.intensity={kind: zscore, clip: false}",),
        ("logger=wandb",),
    ],
    ids=str,
)
def test_the_first_stage_takes_a_step(ldm, tiny, overrides):
    code, text = ldm("train-vae", *tiny, "trainer.max_steps=1", *overrides)
    assert not code, text
    assert "PSNR" in text


@pytest.mark.slow
def test_the_segmenter_takes_a_step_and_measures(ldm, tiny, tmp_path):
    code, text = ldm("train-segmenter", *tiny, "trainer.max_steps=2", "segmenter.network.channels=[8,16]")
    assert not code, text
    from ldm.model.segmenter import Segmenter

    segmenter = Segmenter.load(tmp_path / "runs/simulated/segmenter/model.safetensors")
    volumes = segmenter.volumes(np.random.default_rng(0).random((1, 24, 24, 24), dtype=np.float32))
    assert set(volumes) == {"csf", "grey_matter", "white_matter", "ventricles"}
    assert sum(volumes.values()) <= 24**3 * 8**3
    assert segmenter.facts["unnamed"] == []


@pytest.mark.slow
def test_the_predictor_takes_a_step(ldm, tiny, tmp_path):
    code, text = ldm("train-predictor", *tiny, "trainer.max_steps=1", "predictor.network.channels=[8,16]")
    assert not code, text
    from ldm.model.predictor import Predictor

    predictor = Predictor.load(tmp_path / "runs/simulated/predictor/model.safetensors")
    found = predictor.predict(np.random.default_rng(0).random((2, 1, 24, 24, 24), dtype=np.float32))
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "age": (2,),
        "sex": (2, 2),
        "ventricles_mm3": (2,),
        "brain_mm3": (2,),
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_go_all_the_way(ldm, tiny, tmp_path, mode):
    rng = np.random.default_rng(0)
    rows = ["participant_id\tage\tkind"]
    (tmp_path / "pictures").mkdir()
    for i in range(24):
        y, x = np.mgrid[:30, :26]  # not a multiple of anything: padded on the way in, cropped on the way out
        radius = 4 + i / 4
        picture = 200 * np.exp(-((y - 15) ** 2 + (x - 13) ** 2) / radius**2) + rng.normal(20, 5, (30, 26))
        if mode == "RGB":
            picture = picture[..., None] * np.array([1.0, 0.5, 0.2])
        PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8), mode).save(tmp_path / f"pictures/s{i}.png")
        rows.append(f"s{i}\t{40 + i}\t{'ab'[i % 2]}")
    (tmp_path / "pictures/participants.tsv").write_text("\n".join(rows) + "\n")
    networks = [item for item in tiny if not item.startswith("data.")]
    settings = (
        *networks,
        "data=nifti",
        "data.name=pictures",
        "data.spatial_dims=2",
        "data.root=pictures",
        "data.num_workers=0",
        "data.image='{participant_id}.png'",
        "data.intensity={kind: window, lower: 0, upper: 255}",
        "data.covariates={age: {kind: continuous, unit: years}, kind: {kind: categorical}}",
        "trainer.max_steps=1",
    )
    for verb in ("train-vae", "train-predictor", "train-ldm"):
        code, text = ldm(verb, *settings, "predictor.network.channels=[8,16]")
        assert not code, text
    code, text = ldm("sample", *settings, "n=2", "steps=2", "out=out")
    assert not code, text
    assert sorted(path.name for path in (tmp_path / "out").glob("sub-*")) == ["sub-000001.png", "sub-000002.png"]
    sample = PIL.Image.open(tmp_path / "out/sub-000002.png")
    assert (sample.size, sample.mode) == ((26, 30), mode)
    assert json.loads((tmp_path / "out/participants.json").read_text())["age"]["Units"] == "years"
    instrument = "data.instrument={kind: predictor, path: runs/pictures/predictor/model.safetensors}"
    code, text = ldm("evaluate", *settings, instrument, "n=4", "repeats=2", "steps=2")
    assert not code, text
    metrics = json.loads((tmp_path / "runs/pictures/evaluation/metrics.json").read_text())
    assert sum(map(sum, metrics["fidelity"]["kind"]["samples"]["confusion"])) == 6  # the repeated ones too
    report = (tmp_path / "runs/pictures/evaluation/report.html").read_text()
    assert "Asked against found: kind" in report
    assert f"of {metrics['n']['held_out']} held-out images" in report


def test_pixel_space_needs_no_first_stage(ldm, tiny):
    tiny = [item for item in tiny if not item.startswith("vae.")]
    code, text = ldm("train-vae", *tiny, "vae=identity")
    assert code
    assert "nothing to train" in text
    code, text = ldm("train-ldm", *tiny, "vae=identity", "trainer.max_steps=2")
    assert not code, text
    model = LatentDiffusionModel.load("runs/simulated/ldm/model.safetensors")
    assert model.latent_shape == (1, *model.preprocessing.shape)
    scan = torch.rand(1, 1, *model.preprocessing.shape)
    mean, std = model.first_stage.encode(scan)
    assert torch.equal(mean, scan)
    assert not std.any()
    torch.testing.assert_close(model.decode(model.latent_space.to_scaled(scan)), scan)
    code, text = ldm("evaluate", *tiny, "vae=identity", "n=4", "repeats=1", "steps=1")
    assert not code, text
