"""From images to images: changed by a strength, between two, and filled in.

All take images on the model's grid and in its range, or the files of their channels, and what is asked of the result,
as `LatentDiffusionModel.sample` does: covariates, inputs and sampling options. Covariates that are not given fall to
their nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import noise
from ldm.diffusion.inpainting import keep_known, slerp
from ldm.diffusion.samplers import ddim, ddim_encode
from ldm.diffusion.samplers import sampler as find_sampler
from ldm.errors import LdmError


class Editing:
    """The part of :class:`ldm.model.latent_diffusion.LatentDiffusionModel` that starts from images."""

    @torch.no_grad()
    def image_to_image(
        self,
        image: Any,
        strength: float,
        covariates: Mapping[str, Any] | None = None,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Images that begin as noised ``image`` (SDEdit, Meng et al. 2022).

        Args:
            image: ``(C, *S)``, or a file, or {channel: file}.
            strength: share of the chain that is walked, above 0 (unchanged but for the first stage) to 1 (anew).
            covariates: one row for all.
            n: images.
            seed: of the noise.
            options: see :meth:`sample`.

        Returns:
            ``(n, C, *S)``.

        Raises:
            LdmError: a strength that leaves no move of the chain, or an image that does not fit.
        """
        condition, settings = self._asked(covariates, n, options)
        count = round(strength * settings.num_inference_steps)
        if not 0 < strength <= 1 or count < 1:
            raise LdmError(
                f"strength is {strength}; legal: above 0 to 1, and at least one move of num_inference_steps, which is "
                f"{settings.num_inference_steps}."
            )
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing).last(count)
        streams = noise.generators(seed, range(n))
        eps = noise.draw(streams, self.latent_shape).to(self.device)  # (n, C, *S)
        x = grid.alpha[0] * self.to_latent(image) + grid.sigma[0] * eps
        chain = find_sampler(settings.sampler, **dict(settings.options or {}))
        return _array(self.decode(chain(self.guided_denoise(condition, settings), x, grid, streams)))

    @torch.no_grad()
    def interpolate(
        self, a: Any, b: Any, n: int = 8, covariates: Mapping[str, Any] | None = None, **options: Any
    ) -> np.ndarray:
        """Images between two: both are brought to noise by DDIM, interpolated on the sphere, and brought back.

        Guidance is off, as a guided chain does not lead back to where it came from.

        Args:
            a, b: see :meth:`image_to_image`.
            n: images, ``a`` and ``b`` as the chain reconstructs them included; 2 or more.
            covariates: one row for all.
            options: inputs, ``num_inference_steps`` and ``timestep_spacing``.

        Returns:
            ``(n, C, *S)``.
        """
        if n < 2:
            raise LdmError(f"n is {n}; legal: 2 or more, the two images included.")
        condition, settings = self._asked(covariates, n, options)
        settings = replace(settings, guidance_scale=1.0)
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        ends = torch.cat([self.to_latent(a), self.to_latent(b)])  # (2, C, *S)
        two = {name: value[[0, -1]] for name, value in condition.items()}
        first, last = ddim_encode(self.guided_denoise(two, settings), ends, grid).chunk(2)
        x = torch.cat([slerp(first, last, k / (n - 1)) for k in range(n)])  # (n, C, *S)
        return _array(self.decode(ddim(self.guided_denoise(condition, settings), x, grid)))

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        fill: Any,
        covariates: Mapping[str, Any] | None = None,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """``image`` with a region generated anew; outside it the voxels are those of ``image``.

        A cell of the latent is known if all its voxels are.

        Args:
            image: see :meth:`image_to_image`; the region's own values do not matter where the first stage is local.
            fill: ``(*S)``, True where to generate.
            covariates: one row for all.
            n: images.
            seed: of the noise.
            options: see :meth:`sample`.

        Returns:
            ``(n, C, *S)``.

        Raises:
            LdmError: a region of another shape, or an empty one.
        """
        fill = torch.as_tensor(np.asarray(fill) != 0).to(self.device)  # (*S)
        pixels = self._pixels(image)  # (1, C, *S)
        if fill.shape != pixels.shape[2:] or not fill.any():
            raise LdmError(
                f"fill has shape {tuple(fill.shape)} and {int(fill.sum())} voxels; legal: {tuple(pixels.shape[2:])}, "
                "one or more."
            )
        condition, settings = self._asked(covariates, n, options)
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        pool = torch.nn.functional.adaptive_max_pool3d if fill.ndim == 3 else torch.nn.functional.adaptive_max_pool2d
        known = pool(fill[None].float(), self.latent_shape[1:])[None] == 0  # (1, 1, *s)
        denoise = keep_known(self.guided_denoise(condition, settings), self.to_latent(image), known)
        streams = noise.generators(seed, range(n))
        x = grid.start_std * noise.draw(streams, self.latent_shape).to(self.device)  # (n, C, *s)
        chain = find_sampler(settings.sampler, **dict(settings.options or {}))
        return _array(torch.where(fill, self.decode(chain(denoise, x, grid, streams)), pixels))

    @torch.no_grad()
    def to_latent(self, image: Any) -> Tensor:
        """The scaled latent ``(1, C, *s)`` of one image, the posterior's mean."""
        mean, _ = self.first_stage.encode(self._pixels(image))
        return self.latent_space.to_scaled(mean.float())

    def _pixels(self, image: Any) -> Tensor:
        channels = self.preprocessing.channels
        shape = (len(channels), *self.preprocessing.shape)
        if isinstance(image, str | Path):
            image = {channels[0]: image}
        if isinstance(image, Mapping):
            if sorted(image) != sorted(channels):
                raise LdmError(f"Expected a file for each of {', '.join(channels)}, got {', '.join(map(str, image))}.")
            image = self.preprocessing.read_channels({name: str(image[name]) for name in channels})
        array = np.asarray(image, dtype=np.float32)
        if array.shape != shape:
            raise LdmError(f"An image of shape {array.shape} is not on the model's grid; legal: {shape}, or a file.")
        return torch.from_numpy(array)[None].to(self.device)  # (1, C, *S)

    def _asked(self, covariates: Mapping[str, Any] | None, n: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
        options, inputs = self.options_and_inputs(options)
        rows, inputs = self.requests(covariates or {}, inputs, n)
        return self.encode_condition(rows, inputs), self.settings(options)


def _array(images: Tensor) -> np.ndarray:
    return images.float().cpu().numpy()
