"""Untrained models and training steps on the meta device, where tensors have a shape and no memory."""

import torch
from hydra import compose, initialize_config_dir

from ldm.commands.import_weights import describe
from ldm.commands.main import conf_dir
from ldm.commands.run import plain
from ldm.commands.stages import grid_multiple
from ldm.conditioning.build import complete
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.latents.space import LatentSpace
from ldm.model.gan import GAN
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.gan import MODULES
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.vae import VAE


def composed(experiment, *overrides, verb="train-ldm"):
    """The configuration of an experiment for a training, of data that are not there."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(verb, [f"experiment={experiment}", "data.root=somewhere", *overrides])


def untrained(config, channels, shape=None):
    """The model of a configuration, and the shape ``(C, *S)`` of its images; ``shape`` where it has none."""
    data = plain(config.data) if shape is None else {**plain(config.data), "shape": shape}
    preprocessing = Preprocessing.from_config(data, grid_multiple(config))
    header = describe(config, preprocessing, channels)
    space = LatentSpace.identity(header["latent_shape"][0])
    schema = CovariateSchema.from_config({k: one for k, one in data["covariates"].items() if one is not None})
    factor = preprocessing.shape[0] // header["latent_shape"][1]
    header["conditioners"] = complete(header["conditioners"], schema, data["label_names"], (), factor)
    with torch.device("meta"):
        model = LatentDiffusionModel(header, space, preprocessing, schema)
    return model.to("meta"), (channels, *preprocessing.shape)


def step_of_second_stage(config, model, monkeypatch, batch=2):
    """One optimisation step; returns the losses ``(B,)`` and the module."""
    ldm, shape = plain(config.ldm), model.latent_shape
    with torch.device("meta"):
        module = LatentDiffusion(model, ldm["optimizer"], ldm["loss"], ldm["ema_decays"])
        latents = {"mean": torch.randn(batch, *shape), "std": torch.rand(batch, *shape)}
        conditioners = module.network.conditioners
        condition = {name: one.not_given(batch, shape[1:]) for name, one in conditioners.items()}
        monkeypatch.setattr(model, "batch_condition", lambda _: condition)  # sentences cannot be read off this device
        draws = {"t": torch.zeros(batch, dtype=torch.long), "hide": torch.rand(batch, conditioners.num_uniforms)}
        draws |= {name: torch.randn(batch, *shape) for name in ("posterior", "eps")}
        weighted, _ = module.losses(module.network, latents, draws)
        weighted.mean().backward()
        module.configure_optimizers().step()
    return weighted, module


def step_of_first_stage(config, image_shape):
    """One optimisation step; returns reconstruction, terms of the loss and the module."""
    vae = plain(config.vae)
    loss = {**vae["loss"], "perceptual_weight": 0.0, "adversarial_start": 0}  # perceptual: its weights are a file
    with torch.device("meta"):
        network = {**vae["network"], "in_channels": image_shape[0]}
        module = VAE(network, loss, vae["optimizer"], vae["discriminator"], image_shape)
        module._step = torch.zeros((), dtype=torch.long, device="cpu")  # its value decides what is on
        x = torch.rand(1, *image_shape)
        reconstruction, mean, std = module(x)
        terms = module.loss_terms(x, reconstruction, mean, std)
        if module.discriminator is not None:
            terms["discriminator"] = module.discriminator.discriminator_loss(x, reconstruction)
        sum(terms.values()).backward()
        for optimizer in module.configure_optimizers():
            optimizer.step()
    return reconstruction, terms, module


def step_of_gan(config, image_shape, batch=2):
    """One backward pass of all losses; returns images ``(B, C, *S)`` of the generator and the module."""
    gan, (channels, *size) = plain(config.gan), image_shape
    recipe = Preprocessing.from_config({**plain(config.data), "shape": size}, 1)
    network = {**gan["network"], "spatial_dims": len(size), "out_channels": channels, "image_size": size}
    header = {"method": gan["method"], "encoder": gan.get("encoder"), "condition": gan["condition"], "seed": 0}
    header |= {"network": {**network, "value_range": list(recipe.value_range)}, "cohort": "c", "split_sha256": "0" * 64}
    covariates = {name: one for name, one in plain(config.data)["covariates"].items() if one is not None}
    with torch.device("meta"):
        model = GAN(header, recipe, CovariateSchema.from_config(covariates))
        module = MODULES[gan["method"]](model, gan["optimizer"], gan["discriminator"], gan["loss"]).to("meta")
        module._step = torch.zeros((), dtype=torch.long, device="cpu")  # a number that the penalty asks for
        condition = {name: one.not_given(batch, size) for name, one in model.network.conditioners.items()}
        draws = {name: torch.randn(batch, *model.latent_shape) for name in ("z", "posterior")}
        terms, _ = module.loss_terms(torch.rand(batch, *image_shape), condition, draws)
        (module.weighted(terms) + module.of_discriminator(terms)).backward()
        return module.network(draws["z"], condition), module
