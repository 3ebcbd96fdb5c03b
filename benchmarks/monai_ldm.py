"""The peer: MONAI's 3-D latent diffusion recipe on the same volumes, with the same metric and the same minutes.

    python benchmarks/monai_ldm.py experiment=hippocampus/ours run_dir=runs/monai_peer \\
        +vae_seconds=1200 +ldm_seconds=1200 +full_chain=4 \\
        'data.augment={flip_axes: [], scale: 0, shift: 0, rotate: 0, gamma: 0}'

AutoencoderKL 32-64-64 and DiffusionModelUNet 64-128-192 as in MONAI's 3d_ldm tutorial, float32, scaling factor from
one batch, the encoder in the loop, no augmentation, covariates as a context token. Perceptual loss is left out on both
sides, for it needs downloaded weights. Samples are drawn with MONAI's DDIM (its strided DDPM is wrong, its full chain
slow); the study's instrument measures them. Writes ``metrics.json`` and pictures, also of ``full_chain`` samples of the
full chain.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from monai.inferers import LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from omegaconf import DictConfig
from torch.nn import functional as F
from tqdm import tqdm

from ldm.commands.held_out import held_out
from ldm.commands.main import conf_dir
from ldm.commands.run import plain
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.evaluation.agreement import agreement
from ldm.evaluation.instruments import find_instruments, merged
from ldm.training import figures
from ldm.training.panels import describe
from ldm.training.vae import psnr

logger = logging.getLogger(__name__)
SCHEDULE = {"num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
WARM_UP_EPOCHS = 5  # before the adversarial term starts, as in the tutorial


def train_autoencoder(loader, limit: float) -> tuple[AutoencoderKL, int]:
    """L1 + 1e-6 KL (summed) + 0.01 adversarial, Adam 1e-4, batch 2."""
    net = AutoencoderKL(
        3, 1, 1, (1, 1, 1), (32, 64, 64), (False, False, True), 3, norm_num_groups=16,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    critic = PatchDiscriminator(3, channels=32, num_layers_d=3, in_channels=1, out_channels=1)
    adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
    generator_optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-4)
    start, steps, epoch = time.monotonic(), 0, 0
    while time.monotonic() - start < limit:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            x = batch["image"]
            reconstruction, mean, std = net(x)
            kl = 0.5 * (mean**2 + std**2 - torch.log(std**2) - 1).sum((1, 2, 3, 4)).mean()
            loss = F.l1_loss(reconstruction, x) + 1e-6 * kl
            if epoch >= WARM_UP_EPOCHS:
                score = critic(reconstruction)[-1]
                loss = loss + 0.01 * adversarial(score, target_is_real=True, for_discriminator=False)
            generator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            generator_optimizer.step()
            if epoch >= WARM_UP_EPOCHS:
                critic_optimizer.zero_grad(set_to_none=True)
                fake = adversarial(critic(reconstruction.detach())[-1], target_is_real=False, for_discriminator=True)
                real = adversarial(critic(x)[-1], target_is_real=True, for_discriminator=True)
                (0.01 * 0.5 * (fake + real)).backward()
                critic_optimizer.step()
            steps += 1
            if time.monotonic() - start >= limit:
                break
        epoch += 1
    return net.eval(), steps


def train_diffusion(autoencoder, loader, covariates: int, limit: float):
    """Epsilon prediction, scaled-linear betas 0.0015 to 0.0195, Adam 1e-4, batch 2, the encoder in the loop."""
    unet = DiffusionModelUNet(
        3, 3, 3, num_res_blocks=1, channels=(64, 128, 192), attention_levels=(False, True, True),
        num_head_channels=(0, 64, 64), with_conditioning=True, cross_attention_dim=covariates,
    )  # fmt: skip
    scheduler = DDPMScheduler(**SCHEDULE)
    with torch.no_grad():
        z = autoencoder.encode_stage_2_inputs(next(iter(loader))["image"])
    inferer = LatentDiffusionInferer(scheduler, scale_factor=float(1 / z.std()))
    optimizer = torch.optim.Adam(unet.parameters(), 1e-4)
    start, steps, epoch = time.monotonic(), 0, 0
    while time.monotonic() - start < limit:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            noise = torch.randn_like(z[: len(batch["image"])])
            t = torch.randint(0, 1000, (len(noise),))
            output = inferer(
                batch["image"], autoencoder, unet, noise, t, condition=batch["covariates"].nan_to_num()[:, None]
            )
            loss = F.mse_loss(output, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1
            if time.monotonic() - start >= limit:
                break
        epoch += 1
    return unet.eval(), inferer, steps


@torch.no_grad()
def draw(autoencoder, unet, inferer, scheduler, steps: int, codes: torch.Tensor, size) -> list[np.ndarray]:
    """Samples at encoded covariates ``(N, K)``, eight at a time."""
    scheduler.set_timesteps(steps)
    samples = []
    for part in tqdm(codes.split(8), desc=f"sampling, {steps} steps"):
        noise = torch.randn(len(part), *size)
        images = inferer.sample(noise, autoencoder, unet, scheduler, conditioning=part[:, None], verbose=False)
        samples += [image.clamp(0, 1).numpy() for image in images]
    return samples


@torch.no_grad()
def evaluate(autoencoder, unet, inferer, datamodule, instrument, config) -> dict:
    """Held-out PSNR; asked against measured over n samples of MONAI's DDIM; pictures of its full chain as well."""
    real, rows, _ = held_out(datamodule, datamodule.preprocessing.channels)
    images = [torch.from_numpy(x) for x in real]
    values = [psnr(x, autoencoder.reconstruct(x[None])[0].clamp(0, 1), 1.0) for x in images]
    result = {"psnr_mean": float(np.mean(values)), "psnr_std": float(np.std(values)), "fidelity": {}}
    asked = [rows[i % len(rows)] for i in range(config.n)]
    codes = torch.from_numpy(datamodule.schema.encode_table(asked)).nan_to_num()
    size = autoencoder.encode(images[0][None])[0].shape[1:]
    ddim = DDIMScheduler(**SCHEDULE, clip_sample=False)
    samples = draw(autoencoder, unet, inferer, ddim, config.steps or 50, codes, size)
    measured = [] if instrument is None else [instrument(image) for image in samples]
    for name in measured[0] if measured else ():
        result["fidelity"][name] = agreement([row[name] for row in asked], [m[name] for m in measured])
    figures.mosaic(samples[:16], Path(config.run_dir) / "samples.png", [describe(row) for row in asked[:16]])
    full = draw(autoencoder, unet, inferer, DDPMScheduler(**SCHEDULE), 1000, codes[: config.full_chain], size)
    figures.mosaic(full, Path(config.run_dir) / "samples_ddpm1000.png", [describe(row) for row in asked[: len(full)]])
    return result


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def main(config: DictConfig) -> None:
    """Train, sample, measure, write."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.manual_seed(config.seed)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    datamodule = prepared(cohort_datamodule(config, batch_size=2))
    loader = datamodule.train_dataloader()
    autoencoder, vae_steps = train_autoencoder(loader, config.vae_seconds)
    unet, inferer, ldm_steps = train_diffusion(autoencoder, loader, len(datamodule.schema), config.ldm_seconds)
    found = find_instruments(plain(config.data).get("instrument"), datamodule.preprocessing, datamodule.schema)
    result = evaluate(autoencoder, unet, inferer, datamodule, merged(found), config)
    result |= {"vae_steps": vae_steps, "ldm_steps": ldm_steps, "vae_seconds": config.vae_seconds,
               "ldm_seconds": config.ldm_seconds, "split_sha256": datamodule.cohort.split_hash}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(result, indent=1))
    logger.info("%s", json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
