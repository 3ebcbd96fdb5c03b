"""Nothing that a user is given by somebody else is executed."""

import json
import pickle

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ldm.commands.main import conf_dir
from ldm.commands.safe import ALLOWED_TARGETS, build
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.fit import read_checkpoint


class Hostile:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


def test_a_pickled_model_is_not_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"state_dict": Hostile(tmp_path / "trace")}, path)
    with pytest.raises(LdmError, match="not a readable safetensors file"):
        LatentDiffusionModel.load(path)
    assert not (tmp_path / "trace").exists()


def test_a_hostile_resume_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"ldm": {"identity": {}}, "state": Hostile(tmp_path / "trace")}, path)
    with pytest.raises(LdmError, match="not a checkpoint of this package"):
        read_checkpoint(path, {})
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "target", ["os.system", "pytorch_lightning.loggers.csv_logs.os.system", "subprocess.Popen", "builtins.eval"]
)
def test_a_foreign_target_is_refused_at_any_depth(target):
    config = OmegaConf.create(
        {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": {"a": [{"_target_": target, "_args_": ["x"]}]}}
    )
    with pytest.raises(LdmError, match="is not allowed"):
        build(config, "logger")


def test_every_target_of_the_configuration_is_allowed():
    for name in ("wandb", "tensorboard", "csv"):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("train-vae", [f"logger={name}"])
        assert config.logger.extra[name]["_target_"] in ALLOWED_TARGETS


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, "without the description"),
        ({"ldm": "[]"}, "without the description"),
        ({"ldm": json.dumps({"format_version": 99})}, "format version 99"),
        ({"ldm": json.dumps({"format_version": 1, "kind": "first_stage"})}, "of kind 'first_stage'"),
        (
            {"ldm": json.dumps({"format_version": 1, "kind": "latent_diffusion"})},
            "whole model .KeyError: 'distribution'",
        ),
    ],
)
def test_a_foreign_header_is_named(tmp_path, header, expected):
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", metadata=header)
    with pytest.raises(LdmError, match=expected):
        LatentDiffusionModel.load(tmp_path / "m.safetensors")
