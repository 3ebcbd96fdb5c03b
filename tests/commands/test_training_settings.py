"""What training would ignore, or find out too late, is refused before anything is read or encoded."""

import numpy as np
import PIL.Image
import pytest
from hydra import compose, initialize_config_dir

from ldm.commands.main import conf_dir
from ldm.commands.run import plain
from ldm.commands.stages import grid_multiple
from ldm.commands.train_ldm import check_diffusion
from ldm.errors import LdmError


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train-ldm", [*overrides, "data.root=somewhere"])


@pytest.mark.parametrize("setting", ["patience=3", "keep_best=true"])
def test_what_goes_by_a_dice_needs_one(setting):
    name = setting.split("=")[0]
    check_diffusion(plain(composed("ldm=segmentation", f"ldm.{setting}").ldm))
    with pytest.raises(LdmError, match=rf"ldm\.{name} .*needs ldm\.val_samples of 1 or more"):
        check_diffusion(plain(composed("ldm=segmentation", "ldm.val_samples=0", f"ldm.{setting}").ldm))
    with pytest.raises(LdmError, match=rf"ldm\.{name} .*needs ldm\.target=labels"):
        check_diffusion(plain(composed(f"ldm.{setting}").ldm))


def test_patches_belong_to_the_grid():
    three = "ldm.network.channels=[32,64,64]"
    assert grid_multiple(composed("vae=identity", three)) == 4
    assert grid_multiple(composed("vae=identity", three, "ldm.network.patch_size=2")) == 8


def test_the_check_prints_a_grid_that_patches_fit(ldm, tmp_path):
    (tmp_path / "made").mkdir()
    for i in range(10):
        PIL.Image.fromarray(np.add.outer(np.arange(100), np.arange(100) + i).astype(np.uint8)).save(
            tmp_path / f"made/s{i}.png"
        )
    table = ["participant_id", *(f"s{i}" for i in range(10))]
    (tmp_path / "made/participants.tsv").write_text("\n".join(table) + "\n")
    asked = ("check", "data=nifti", "data.name=made", "data.root=made", "data.spatial_dims=2", "vae=identity")
    asked += ("data.image='{participant_id}.png'", "data.intensity={kind: window, lower: 0, upper: 255}")
    asked += ("ldm.network.channels=[32,64,64]", "ldm.network.patch_size=2", "data.split.fractions.valid=0.1")
    code, text = ldm(*asked)
    assert not code, text
    assert "shape [104, 104]" in text
    code, text = ldm(*asked, "data.shape=[100,100]")
    assert code
    assert "axis 0: 100 is not a multiple of 8" in text, text
