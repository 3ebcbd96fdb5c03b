"""From images to images: changed by a strength, between two, and filled in.

All take images on the model's grid and in its range, or the files of their channels, and what is asked of the result,
as `LatentDiffusionModel.sample` does: covariates, inputs and sampling options. Covariates that are not given fall to
their nulls, sampling options to `CHAIN` and the model's own. What is asked for is prepared once, as an `Edit`, whose
images may then be drawn a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.base import Condition
from ldm.diffusion import noise
from ldm.diffusion.checks import check_number
from ldm.diffusion.inpainting import keep_known, slerp
from ldm.diffusion.samplers import ddim, ddim_encode
from ldm.diffusion.samplers import sampler as find_sampler
from ldm.errors import LdmError
from ldm.precision import autocast

if TYPE_CHECKING:
    from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions

#: Where nothing else is asked for. Moves at evenly spaced times make a strength the share of the training times that
#: is walked, and many of them bring an image back to where DDIM's encoding took it from.
CHAIN = {"num_inference_steps": 50, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Request:
    """What is asked of the images of an edit.

    Attributes:
        rows: covariates, one row an image.
        inputs: label maps, images and texts, one an image each.
        settings: of the chain.
        precision: ``auto``, ``bf16`` or ``float32``.
    """

    rows: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, Sequence[Any]]
    settings: SamplingOptions
    precision: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)


@dataclass(frozen=True)
class Edit:
    """Images that can be drawn in any order: number k comes out the same, whatever is drawn with it.

    Attributes:
        model: what draws.
        request: what is asked for.
        chain: from the condition and the numbers of B images to the images ``(B, C, *S)``.
    """

    model: LatentDiffusionModel
    request: Request
    chain: Callable[[Condition, Sequence[int]], Tensor]

    @torch.no_grad()
    def batches(self, numbers: Sequence[int], batch_size: int = 4) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
        """Images ``(B, C, *S)`` float32 in the model's range and their numbers, ``batch_size`` at a time."""
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            with autocast(self.model.device, self.request.precision):
                drawn = self.chain(self.model.condition_of(self.request, some), some)
            yield drawn.float().cpu().numpy(), some

    def images(self, batch_size: int = 4) -> np.ndarray:
        """All of them: ``(n, C, *S)``."""
        return np.concatenate([images for images, _ in self.batches(range(len(self.request)), batch_size)])


class Editing:
    """The part of :class:`ldm.model.latent_diffusion.LatentDiffusionModel` that starts from images."""

    def image_to_image(
        self,
        image: Any,
        /,
        strength: float,
        covariates: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        n: int | None = 1,
        seed: int = 0,
        batch_size: int = 4,
        **options: Any,
    ) -> np.ndarray:
        """Images that begin as noised ``image`` (SDEdit, Meng et al. 2022).

        Args:
            image: ``(C, *S)``, or a file with all channels, or {channel: file}.
            strength: share of the chain that is walked, above 0 (unchanged but for the first stage) to 1 (anew).
            covariates: one row for all, or several, which are repeated in turn.
            n: images; None is one a row.
            seed: of the noise.
            batch_size: images computed together.
            options: see :meth:`sample`; and ``precision``, by default float32.

        Returns:
            ``(n, C, *S)``.

        Raises:
            LdmError: a strength that leaves no move of the chain, or an image that does not fit.
        """
        return self.plan_image_to_image(image, strength, covariates, n, seed, **options).images(batch_size)

    def interpolate(
        self,
        a: Any,
        b: Any,
        n: int | None = 8,
        covariates: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 4,
        **options: Any,
    ) -> np.ndarray:
        """Images between two: both are brought to noise by DDIM, interpolated on the sphere, and brought back.

        Guidance is off, as a guided chain does not lead back to where it came from.

        Args:
            a, b: see :meth:`image_to_image`.
            n: images, ``a`` and ``b`` as the chain reconstructs them included; 2 or more.
            covariates, batch_size: see :meth:`image_to_image`.
            options: inputs, ``num_inference_steps``, ``timestep_spacing`` and ``precision``.

        Returns:
            ``(n, C, *S)``.
        """
        return self.plan_interpolation(a, b, n, covariates, **options).images(batch_size)

    def inpaint(
        self,
        image: Any,
        /,
        fill: Any,
        covariates: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        n: int | None = 1,
        seed: int = 0,
        batch_size: int = 4,
        **options: Any,
    ) -> np.ndarray:
        """``image`` with a region generated anew; outside it the voxels are those of ``image``.

        A cell of the latent is known if all its voxels are.

        Args:
            image: see :meth:`image_to_image`; the region's own values do not matter where the first stage is local.
            fill: ``(*S)``, True where to generate.
            covariates, n, seed, batch_size, options: see :meth:`image_to_image`.

        Returns:
            ``(n, C, *S)``.

        Raises:
            LdmError: a region of another shape, or an empty one.
        """
        return self.plan_inpainting(image, fill, covariates, n, seed, **options).images(batch_size)

    @torch.no_grad()
    def plan_image_to_image(
        self, image: Any, /, strength: float, covariates: Any = None, n: int | None = 1, seed: int = 0, **options: Any
    ) -> Edit:
        """The edit behind :meth:`image_to_image`."""
        request = self._asked(covariates, n, options)
        settings = request.settings
        check_number("strength", strength, 0, 1, "a number above 0, up to 1")
        count = round(strength * settings.num_inference_steps)
        if count < 1:
            raise LdmError(
                f"strength is {strength}; legal: above 0 to 1, and at least one move of num_inference_steps, which is "
                f"{settings.num_inference_steps}."
            )
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing).last(count)
        start = grid.alpha[0] * self._to_latent(image, request)  # (1, C, *s)
        walk = find_sampler(settings.sampler, **dict(settings.options or {}))

        def chain(condition: Condition, numbers: Sequence[int]) -> Tensor:
            streams = noise.generators(seed, numbers)
            x = start + grid.sigma[0] * noise.draw(streams, self.latent_shape).to(self.device)  # (B, C, *s)
            return self.decode(walk(self.guided_denoise(condition, settings), x, grid, streams))

        return Edit(self, request, chain)

    @torch.no_grad()
    def plan_interpolation(self, a: Any, b: Any, n: int | None = 8, covariates: Any = None, **options: Any) -> Edit:
        """The edit behind :meth:`interpolate`."""
        request = self._asked(covariates, n, options)
        n = len(request)
        if n < 2:
            raise LdmError(f"n is {n}; legal: 2 or more, the two images included.")
        settings = replace(
            request.settings,
            sampler="ddim",
            options=None,
            guidance_scale=1.0,
            guidance_interval=None,
            guidance_rescale=0.0,
        )
        request = replace(request, settings=settings)
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        ends = torch.cat([self._to_latent(one, request) for one in (a, b)])  # (2, C, *s)
        with autocast(self.device, request.precision):
            two = self.condition_of(request, [0, n - 1])
            first, last = ddim_encode(self.guided_denoise(two, settings), ends, grid).chunk(2)  # (1, C, *s) each

        def chain(condition: Condition, numbers: Sequence[int]) -> Tensor:
            x = torch.cat([slerp(first, last, share) for share in between(n, numbers)])  # (B, C, *s)
            return self.decode(ddim(self.guided_denoise(condition, settings), x, grid))

        return Edit(self, request, chain)

    @torch.no_grad()
    def plan_inpainting(
        self, image: Any, /, fill: Any, covariates: Any = None, n: int | None = 1, seed: int = 0, **options: Any
    ) -> Edit:
        """The edit behind :meth:`inpaint`."""
        fill = torch.as_tensor(np.asarray(fill) != 0).to(self.device)  # (*S)
        pixels = self._pixels(image)  # (1, C, *S)
        if fill.shape != pixels.shape[2:] or not fill.any():
            raise LdmError(
                f"fill has shape {tuple(fill.shape)} and {int(fill.sum())} voxels; legal: {tuple(pixels.shape[2:])}, "
                "one or more."
            )
        request = self._asked(covariates, n, options)
        settings = request.settings
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        pool = torch.nn.functional.adaptive_max_pool3d if fill.ndim == 3 else torch.nn.functional.adaptive_max_pool2d
        known = pool(fill[None].float(), self.latent_shape[1:])[None] == 0  # (1, 1, *s)
        latent = self._to_latent(image, request)  # (1, C, *s)
        walk = find_sampler(settings.sampler, **dict(settings.options or {}))

        def chain(condition: Condition, numbers: Sequence[int]) -> Tensor:
            denoise = keep_known(self.guided_denoise(condition, settings), latent, known)
            streams = noise.generators(seed, numbers)
            x = grid.start_std * noise.draw(streams, self.latent_shape).to(self.device)  # (B, C, *s)
            return torch.where(fill, self.decode(walk(denoise, x, grid, streams)), pixels)  # (B, C, *S)

        return Edit(self, request, chain)

    @torch.no_grad()
    def to_latent(self, image: Any) -> Tensor:
        """The scaled latent ``(1, C, *s)`` of one image, the posterior's mean."""
        mean, _ = self.first_stage.encode(self._pixels(image))
        return self.latent_space.to_scaled(mean.float())

    def condition_of(self, request: Request, numbers: Sequence[int]) -> Condition:
        """The condition of some images of a request."""
        inputs = {name: [values[k] for k in numbers] for name, values in request.inputs.items()}
        return self.encode_condition([request.rows[k] for k in numbers], inputs)

    def _to_latent(self, image: Any, request: Request) -> Tensor:
        with autocast(self.device, request.precision):
            return self.to_latent(image)

    def _pixels(self, image: Any) -> Tensor:
        shape = (len(self.preprocessing.channels), *self.preprocessing.shape)
        if isinstance(image, str | Path | Mapping):
            image = self.preprocessing.bring(*self.preprocessing.read_image(image))
        array = np.asarray(image, dtype=np.float32)
        if array.shape != shape:
            raise LdmError(f"An image of shape {array.shape} is not on the model's grid; legal: {shape}, or a file.")
        return torch.from_numpy(array)[None].to(self.device)  # (1, C, *S)

    def _asked(self, covariates: Any, n: int | None, options: Mapping[str, Any]) -> Request:
        options = dict(options)
        precision = options.pop("precision", "float32")
        options, inputs = self.options_and_inputs(options)
        rows, inputs = self.requests({} if covariates is None else covariates, inputs, n)
        return Request(rows, inputs, self.settings({**CHAIN, **options}), precision)


def between(n: int, numbers: Sequence[int]) -> list[float]:
    """How far along, 0 to 1, some of the ``n`` images of an interpolation are."""
    return [k / (n - 1) for k in numbers]
