"""What every model that draws images answers, whatever draws them: a diffusion model or a GAN.

Commands, output and evaluation use this and nothing else, so that all are sampled, written and measured alike.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.base import COVARIATES
from ldm.conditioning.build import SETTINGS
from ldm.data.distribution import CovariateDistribution
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.diffusion.checks import check_count
from ldm.errors import LdmError
from ldm.model.file import load_strict, names_the_file, read_header, read_tensors, write_model
from ldm.model.inputs import Inputs, as_lists, check_inputs, input_names

logger = logging.getLogger(__name__)

CovariateRow = Mapping[str, Any]


@dataclass(frozen=True)
class Samples:
    """Generated images with what was asked for.

    Attributes:
        images: ``(N, C, D, H, W)`` float32 in the model's stored range; 2-D: ``(N, C, H, W)``.
        covariates: one row a sample, in physical units; None where nothing was asked.
        indices: number of each sample in its run; (seed, index) fixes its noise.
    """

    images: np.ndarray
    covariates: list[dict[str, Any]]
    indices: list[int]


class Generative(nn.Module, ABC):
    """A model that draws images from (seed, number of the sample, covariates), and describes the data it learned from.

    Attributes:
        kind: what the file's header calls it.
        section: of the configuration, that it is trained by.
        header: the description that is written into the file.
        preprocessing: how scans became model input, and the way back.
        schema: covariates the model knows.
        distribution: of the training covariates, used when none are asked for; None without covariates.
        network: what was trained; has ``conditioners``.
        latent_shape: of the noise of one sample.
        defaults: sampling options; none for a model that draws in one step.
        what: what kind of model this is, in reports.
        reconstructs: whether :meth:`reconstruct` is possible.
    """

    kind: ClassVar[str]
    section: ClassVar[str]
    header: dict[str, Any]
    preprocessing: Preprocessing
    schema: CovariateSchema
    distribution: CovariateDistribution | None
    network: nn.Module
    latent_shape: tuple[int, ...]
    defaults: Any
    what: str
    reconstructs: bool

    @property
    def classes(self) -> LabelClasses | None:
        """The classes of a model that generates label maps, a mask each; None for one that generates images."""
        return None

    @property
    def nulls(self) -> list[str]:
        """Conditioners that training hid now and then, so that the model can go without them; all covariates, or one.

        Files that do not name them (``learned_nulls``) say it of all at once (``learned_null``), or had all.
        """
        if "learned_nulls" in self.header:
            return list(self.header["learned_nulls"])
        return list(self.network.conditioners) if self.header.get("learned_null", True) else []

    @property
    def unlearned(self) -> list[str]:
        """Conditioners whose null should have been learned and was not; a control needs none."""
        return [name for name, one in self.network.conditioners.items() if one.learns_null and name not in self.nulls]

    @property
    def drop_key(self) -> str:
        """The setting that lets training hide covariates."""
        return f"{self.section}.condition.drop_rate"

    def require_covariates(self, codes: Tensor) -> None:
        """Refuse codes ``(B, K)`` without a covariate that training never hid.

        Raises:
            LdmError: naming it.
        """
        missing = dict(zip(self.schema.names, codes.isnan().any(0).tolist(), strict=True))
        left_out = [name for name in missing if missing[name] and name not in self.nulls]
        if COVARIATES in self.unlearned and left_out:
            raise LdmError(
                f"This model never learned to go without {', '.join(left_out)}: ask for all of them. It would have "
                f"learned it with {self.drop_key} above 0."
            )

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model computes."""

    @classmethod
    @abstractmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """The model that a file's header describes, with weights of no meaning."""

    @classmethod
    @names_the_file
    def outline(cls, path: str | Path) -> Self:
        """A model without its weights and the memory for them: what it is called, knows and allows.

        Raises:
            LdmError: not such a file.
        """
        header = read_header(Path(path), cls.kind)
        with torch.device("meta"):
            return cls.from_header(header).to("meta").eval()

    @classmethod
    @names_the_file
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a model file; nothing in it is executed.

        Raises:
            LdmError: not such a file, or its tensors do not fit its description.
        """
        model = cls.from_header(read_header(Path(path), cls.kind))
        load_strict(model, cls.with_names_of_now(read_tensors(path)), Path(path))
        return model.to(device).eval()

    @staticmethod
    def with_names_of_now(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of a file under the names that this version has for them."""
        return tensors

    def save(self, path: Path) -> None:
        """Write ``model.safetensors`` atomically; the file alone is enough to sample."""
        header = {
            **self.header,
            "kind": self.kind,
            "preprocessing": self.preprocessing.to_dict(),
            "schema": self.schema.to_dict(),
            "distribution": None if self.distribution is None else self.distribution.to_dict(),
        }
        write_model(path, self.state_dict(), header)

    @abstractmethod
    def settings(self, options: Mapping[str, Any]) -> Any:
        """The stored options with ``options`` in their place.

        Raises:
            LdmError: an unknown name, or an illegal value.
        """

    @abstractmethod
    def sample_batches(
        self,
        rows: Sequence[CovariateRow],
        indices: Sequence[int],
        seed: int = 0,
        batch_size: int = 4,
        precision: str = "auto",
        inputs: Inputs | None = None,
        **options: Any,
    ) -> Iterator[Samples]:
        """Draw samples ``indices`` batch by batch, so that any number fits in memory.

        Args:
            rows: one covariate row a sample.
            indices: number of each sample in its run.
            seed, batch_size: see :meth:`sample`.
            precision: ``auto``, ``bf16`` or ``float32``.
            inputs: one value a sample, by the name of its conditioner.
            options: override the stored ones.
        """

    @abstractmethod
    def reconstruct(self, images: Tensor, rows: Sequence[CovariateRow]) -> Tensor:
        """Images ``(B, C, *S)`` of subjects with these covariates, through what the model keeps of an image."""

    def condition_in_words(self) -> str:
        """What the model is conditioned on, for logs and reports."""
        parts = list(input_names(self.network.conditioners))
        if COVARIATES in self.network.conditioners:
            parts.insert(0, f"{self.header['condition']['mode']} on {', '.join(self.schema.names)}")
        return "; ".join(parts) or "nothing"

    def covariate_rows(
        self, covariates: CovariateRow | Sequence[CovariateRow] | None, n: int | None, seed: int = 0
    ) -> list[dict[str, Any]]:
        """The rows that will be asked for.

        Args:
            covariates: one row for all samples, one row each, or None to draw from the stored description of
                the training distribution. Names not given fall to their learned null.
            n: number of samples; with several rows they are repeated in turn.
            seed: of the draw when ``covariates`` is None.

        Raises:
            LdmError: unknown name or level; the message names the nearest.
        """
        if covariates is None:
            n = 1 if n is None else n
            if not len(self.schema) or self.distribution is None:
                return [{} for _ in range(n)]
            return self.distribution.sample(n, seed)
        rows = [dict(covariates)] if isinstance(covariates, Mapping) else [dict(row) for row in covariates]
        if not rows:
            raise LdmError("covariates is an empty table: give at least one row, or leave it out.")
        for row in rows:
            self.schema.encode(row)
            for warning in self.schema.out_of_range(row):
                logger.warning("Extrapolation: %s", warning)
        n = len(rows) if n is None else n
        return [rows[i % len(rows)] for i in range(n)]

    def sample(
        self,
        covariates: CovariateRow | Sequence[CovariateRow] | None = None,
        n: int | None = None,
        seed: int = 0,
        batch_size: int = 4,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Samples:
        """Draw images::

            model.sample({"age": 70}, n=4, mask="sub-01_dseg.nii.gz")
            model.sample(text="T1-weighted MRI of a 70-year-old woman")

        Args:
            covariates: see :meth:`covariate_rows`; with an input beside them, None asks for none.
            n: number of samples; None is one a row, or one a value of the longest list of inputs.
            seed: with the sample's number it fixes the noise, whatever the batch size.
            batch_size: samples computed together.
            progress: called with the number of finished samples.
            options: override the stored :class:`SamplingOptions`; and inputs by the name of their conditioner, one or a
                list: a ``mask``, ``image`` or ``text`` (see :mod:`ldm.model.inputs`).

        Raises:
            LdmError: an unknown option, or an input that is not legal.
        """
        check_count("batch_size", batch_size)
        if n is not None:
            check_count("n", n)
        options, inputs = self.options_and_inputs(options)
        rows, inputs = self.requests(covariates, inputs, n, seed)
        images = []
        for batch in self.sample_batches(rows, range(len(rows)), seed, batch_size, inputs=inputs, **options):
            images.append(batch.images)
            if progress is not None:
                progress(len(batch.images))
        return Samples(np.concatenate(images), rows, list(range(len(rows))))

    def requests(
        self,
        covariates: CovariateRow | Sequence[CovariateRow] | None,
        inputs: Mapping[str, Any],
        n: int | None,
        seed: int = 0,
    ) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
        """Rows and inputs, one a sample.

        Covariates that are not given beside an input are not drawn from the training distribution, as they could
        contradict it: they fall to their nulls.

        Raises:
            LdmError: see :meth:`covariate_rows`; an input that the model does not know.
        """
        check_inputs(self.network.conditioners, inputs)
        if inputs and covariates is None:
            covariates = {}
        lists = as_lists(inputs)
        if n is None:
            several = [] if covariates is None or isinstance(covariates, Mapping) else [len(covariates)]
            n = max([len(values) for values in lists.values()] + several, default=None)
        rows = self.covariate_rows(covariates, n, seed)
        return rows, {name: [values[i % len(values)] for i in range(len(rows))] for name, values in lists.items()}

    def options_and_inputs(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments apart: sampling options, and inputs by the name of their conditioner.

        Raises:
            LdmError: an input that the model does not know.
        """
        names = input_names(self.network.conditioners)
        options = {name: value for name, value in given.items() if name not in names}
        inputs = {name: value for name, value in given.items() if name in names and value is not None}
        check_inputs(self.network.conditioners, {name: None for name in options if name in SETTINGS})
        return options, inputs
