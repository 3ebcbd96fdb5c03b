"""A control on a frozen model, from the command line; covariates are told as the model knows them."""

import numpy as np
import pytest

from ldm.commands.control import recode
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from tests.model.test_transfer import AGE, SEX, VOLUME


def test_covariates_are_told_as_the_frozen_model_knows_them():
    here = CovariateSchema([SEX, Covariate("age", "continuous", "years", (20.0, 70.0))])
    there = CovariateSchema([AGE, VOLUME, SEX])
    codes = recode(here.encode_table([{"age": 60.0, "sex": "M"}, {"sex": "F"}]), here, there)
    expected = np.array([[0.5, np.nan, 1], [np.nan, np.nan, 0]], dtype=np.float32)
    np.testing.assert_allclose(codes, expected, rtol=1e-6)
    for strange, value, message in (
        (VOLUME, 1.0, "data.covariates.volume is unknown to ldm.control.model; leave it out. It knows: age, sex"),
        (Covariate("age", "continuous", "days", (0.0, 1.0)), 1.0, "age is continuous in days, .* continuous in years"),
        (Covariate("sex", "categorical", levels=("F", "X")), "X", "sex"),
    ):
        schema = CovariateSchema([strange])
        with pytest.raises(LdmError, match=message):
            recode(schema.encode_table([{strange.name: value}]), schema, CovariateSchema([AGE, SEX]))


@pytest.mark.slow
def test_a_mask_steers_a_frozen_model(ldm, tiny, tmp_path, cohort_root):
    quick = ("trainer.max_steps=2", "trainer.val_every=2")
    for verb, *settings in (("train-vae", "trainer.max_steps=1"), ("train-ldm", *quick)):
        code, text = ldm(verb, *tiny, *settings)
        assert not code, text
    base, mask = "runs/simulated/ldm/model.safetensors", "ldm.conditioners={mask: {}}"
    control = ("train-ldm", *tiny, f"ldm.control.model={base}", "ldm.network.channels=[32,32]", "run_dir=runs/control")
    code, text = ldm(*control, *quick, mask, "schedule=flow")  # the frozen model says what it is
    assert not code, text
    frozen, made = (LatentDiffusionModel.load(path) for path in (base, "runs/control/model.safetensors"))
    theirs, own = frozen.state_dict(), made.state_dict()
    assert {name for name in own if not name.startswith("network.control.")} == theirs.keys()
    assert all((own[name] == value).all() for name, value in theirs.items())
    for name in ("denoiser", "condition", "schedule", "prediction_type", "first_stage_sha256"):
        assert made.header[name] == frozen.header[name]
    assert made.header["control"]["model_sha256"] == frozen.header["tensors_sha256"]
    zero = [name for name in own if "controlnet_mid_block" in name]
    assert all(own[name].any() for name in zero)

    labels = next(cohort_root.glob("sub-*/anat/*_dseg.nii.gz"))
    drawn = ("sample", *tiny, "model=runs/control/model.safetensors", f"mask={labels}", "n=2", "steps=2", "out=drawn")
    code, text = ldm(*drawn, "guidance_scale={mask: 2.0}")
    assert not code, text
    assert len(list((tmp_path / "drawn").glob("sub-*.nii.gz"))) == 2

    for settings, message in (
        ((), "ldm.conditioners names nothing. Legal: e.g. ldm.conditioners={mask: {}}"),
        (("ldm.conditioners={mask: {}, text: {caption: a}}",), "names mask, text"),
        (("ldm.conditioners={mask: {mode: spade}}",), "mask.mode has no meaning with ldm.control.model"),
        ((mask, f"ldm.init_from={base}"), "exclude each other"),
        ((mask, "run_dir=runs/simulated/ldm"), "lies where this run writes its own"),
        ((mask, "ldm.control.model=runs/control/model.safetensors", "run_dir=x"), "is given a mask already"),
        ((mask, "data.shape=[32,32,32]", "run_dir=x"), "set data.shape="),
    ):
        code, text = ldm(*control, *settings)
        assert code
        assert message in text, text
