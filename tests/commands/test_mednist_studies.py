"""The studies on MedNIST take a step each, and share one first stage and one encoding of the cohort."""

import numpy as np
import PIL.Image
import pytest

from ldm.model.file import read_header
from ldm.model.latent_diffusion import LatentDiffusionModel

pytestmark = pytest.mark.slow

CLASSES = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
FAST = (
    "trainer.max_steps=1",
    "vae.batch_size=4",
    "ldm.batch_size=4",
    "ldm.val_steps=1",
    "ldm.val_samples=1",
    "data.num_workers=0",
    "trainer=cpu",
)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Four pictures a class, two of them to train on, where `data=mednist` looks for them."""
    rng, rows = np.random.default_rng(0), ["file,class,label,split"]
    for label, name in enumerate(CLASSES):
        folder = tmp_path / "data/images64" / name
        folder.mkdir(parents=True)
        for i, split in enumerate(("train", "train", "valid", "test")):
            picture = rng.normal(40 * label + 20, 10, (64, 64)).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(picture).save(folder / f"{i}.png")
            rows.append(f"{name}/{i}.png,{name},{label},{split}")
    (tmp_path / "data/mednist64_1000pc.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("LDM_MEDNIST_ROOT", str(tmp_path / "data"))


@pytest.fixture
def array(tmp_path, monkeypatch):
    """The same number of pictures where `data=mednist48_lecture` looks for them."""
    rng, arrays = np.random.default_rng(0), {"class_names": np.array(CLASSES)}
    for split, count in (("train", 12), ("valid", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 48, 48), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 6
        arrays[f"{split}_files"] = np.array([f"{split}{i}" for i in range(count)])
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data/mednist48_lecture.npz", **arrays)
    monkeypatch.setenv("LDM_MEDNIST48_ROOT", str(tmp_path / "data"))


def test_conditions_and_ablation_on_one_first_stage(ldm, pictures, tmp_path):
    for verb, study in (
        ("train-vae", "class_conditional"),
        ("train-ldm", "class_conditional"),
        ("train-ldm", "unconditional"),
        ("train-ldm", "text"),
    ):
        code, text = ldm(verb, f"experiment=mednist_ldm/{study}", *FAST)
        assert not code, text
    ablation = ",".join(f"mednist_ldm/ablation/{name}" for name in ("epsilon", "flow"))
    code, text = ldm("train-ldm", "--multirun", f"experiment={ablation}", "ldm.loss.weighting=min_snr", "seed=2", *FAST)
    assert not code, text

    runs = tmp_path / "runs/mednist_ldm"
    assert len(list(runs.rglob("mean.npy"))) == 2  # the training and the validation pictures, encoded once
    models = {
        "mednist/ldm": (["class"], "flow", "uniform"),
        "unconditional/mednist/ldm": ([], "flow", "uniform"),
        "text/mednist/ldm": (["text"], "flow", "uniform"),
        **{f"ablation/{name}-min_snr-2": (["class"], name, "min_snr") for name in ("epsilon", "flow")},
    }
    first_stage = read_header(runs / "mednist/vae/model.safetensors")["tensors_sha256"]
    for folder, (condition, prediction, weighting) in models.items():
        header = read_header(runs / folder / "model.safetensors")
        assert header["latent_shape"] == [3, 16, 16]
        assert header["first_stage_sha256"] == first_stage
        assert (header["prediction_type"], header["loss"]["weighting"]) == (prediction, weighting)
        assert conditions(runs / folder / "model.safetensors") == condition
    model = LatentDiffusionModel.load(runs / "text/mednist/ldm/model.safetensors")
    codes = [model.encode_condition([{}], {"text": [text]}) for text in ("a chest CT", "a hand radiograph")]
    told = model.encode_condition([{"class": "ChestCT"}, {"class": "Hand"}])["text"]
    for code, row in zip(codes, told, strict=True):
        assert (code["text"][0] == row).all()


def conditions(path):
    """Names of what a model is conditioned on, the class for covariates."""
    names = LatentDiffusionModel.load(path).network.conditioners
    return ["class" if name == "covariates" else name for name in names]


def test_the_codes_of_the_lecture_have_432_numbers(ldm, array, tmp_path):
    for verb in ("train-vae", "train-ldm"):
        code, text = ldm(verb, "experiment=mednist_vae/lecture", "data.download=true", *FAST)
        assert not code, text
    header = read_header(tmp_path / "runs/mednist_vae/mednist48_lecture/ldm/model.safetensors")
    assert np.prod(header["latent_shape"]) == 432


def test_the_gans_see_the_prepared_pictures_of_the_diffusion_model(ldm, pictures, tmp_path):
    code, text = ldm("train-gan", "experiment=mednist_gan/vaegan", *FAST, "gan.batch_size=4", "gan.val_samples=1")
    assert not code, text
    header = read_header(tmp_path / "runs/mednist_ldm/mednist/vaegan/model.safetensors")
    assert header["network"]["image_size"] == [64, 64]
    assert list(header["schema"]) == ["class"]
    assert (tmp_path / "runs/mednist_ldm/mednist/cache").is_dir()
