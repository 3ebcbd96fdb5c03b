"""The published preset of segmentation by diffusion: what is published, and a network of its sizes."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from ldm.applications.segmentation_sources import MEMBERS
from ldm.commands.main import conf_dir
from ldm.commands.run import plain
from ldm.commands.target import asked_conditioners
from ldm.conditioning.build import complete
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.network import ConditionalDenoiser


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train-ldm", ["experiment=brats_segmentation/published", "data.root=somewhere"])


def test_what_is_published_is_in_the_preset(config):
    ldm = config.ldm
    assert (ldm.schedule.num_train_timesteps, ldm.schedule.beta_schedule) == (1000, "linear")
    assert (ldm.network.channels[0], ldm.network.num_res_blocks, ldm.batch_size) == (128, 2, 10)
    assert (ldm.optimizer.lr, ldm.learned_variance, ldm.prediction_type) == (1e-4, True, "epsilon")
    assert list(config.data.image) == ["T1", "T1ce", "T2", "FLAIR"]
    level = list(ldm.network.attention_levels).index(True)
    assert config.data.shape[0] // 2**level == 16  # attention at 16
    assert ldm.network.num_head_channels == ldm.network.channels[level]  # one head
    assert MEMBERS == 5


def test_the_network_is_given_all_sequences_at_every_step(config):
    """Noisy mask and four sequences in, noise and variance of one mask out."""
    asked, schema = asked_conditioners(config), CovariateSchema.from_config({})
    assert asked["image"] == {"channels": ["T1", "T1ce", "T2", "FLAIR"], "drop_rate": 0.0}
    given = complete(asked, schema, None, asked["image"]["channels"], 1, all_given=True)
    with pytest.raises(LdmError, match="leave one of"):
        complete(asked, schema, None, asked["image"]["channels"], 1)
    ldm = plain(config.ldm)
    header = {"denoiser": ldm["network"], "condition": ldm["condition"], "conditioners": given}
    header |= {"latent_shape": [1, *config.data.shape], "learned_variance": True}
    with torch.device("meta"):
        network = ConditionalDenoiser(header, schema)
        images = torch.zeros(2, 4, *config.data.shape)
        condition = {"covariates": torch.zeros(2, 0), "image": images}
        output = network(torch.zeros(2, 1, *config.data.shape), torch.zeros(2), condition)
    assert network.denoiser.unet.conv_in.conv.in_channels == 5
    assert output.shape == (2, 2, *config.data.shape)
