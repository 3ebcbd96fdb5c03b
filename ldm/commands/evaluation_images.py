"""What an evaluation needs and what it looks at: settings, checked before anything is drawn, and then the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ldm.commands.held_out import held_out_set, model_cohort, read_sample
from ldm.commands.run import check_counts, plain, section
from ldm.commands.sample import draw, load_model
from ldm.commands.sampler_table import draw_samplers, read_samplers
from ldm.commands.stages import record_inputs
from ldm.conditioning.base import COVARIATES
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import Record
from ldm.errors import LdmError
from ldm.evaluation.features import FeatureNetwork, check_features, find_features
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.goals import check_goals
from ldm.evaluation.instruments import Instrument, find_instruments
from ldm.evaluation.reconstruction import quality, reconstructions
from ldm.evaluation.sweep import Axis, read_sweep
from ldm.model.generative import Generative
from ldm.model.output import as_written, image_paths, sample_name


@dataclass(frozen=True)
class Setup:
    """What an evaluation needs, all of it checked before the first sample is drawn.

    Attributes:
        config: of the verb.
        model: what is evaluated.
        path: its file.
        datamodule: its cohort.
        network: of the features that distances are taken in; None without one.
        instruments: what measures covariates, by covariate.
        samplers: further ways of drawing, see :func:`ldm.commands.sampler_table.read_samplers`.
        axes: of the sweeps.
        seeds: of the noise.
        goals: see :func:`ldm.evaluation.goals.check_goals`.
    """

    config: DictConfig
    model: Generative
    path: Path
    datamodule: CohortDataModule
    network: FeatureNetwork | None
    instruments: Mapping[str, Instrument]
    samplers: Mapping[str, DictConfig]
    axes: Sequence[Axis]
    seeds: Sequence[int]
    goals: Mapping[str, float]

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class Images:
    """What is measured. Sample i was asked with the covariates of held-out image i, in turn.

    Attributes:
        real: held-out images, as files that they were written to would give them back.
        loaded: the same as loaded, ``(C, *S)`` each.
        records: of these.
        samples: ``n``, of the first seed, and behind them ``repeats`` more with the covariates of the first subjects.
        further: seed -> ``n`` samples of each of the other seeds.
        inputs: what the ``n`` were given beside covariates.
        otherwise: name -> ``n`` samples drawn with other samplers.
        rebuilt: held-out images through the first stage, as files would give them back; None without one.
        reconstruction: see :func:`ldm.evaluation.reconstruction.quality`; None without a first stage.
        value_range: black and white.
        once: the ``n`` alone, as the others repeat covariates.
    """

    real: ImageSet
    loaded: Sequence[np.ndarray]
    records: Sequence[Record]
    samples: ImageSet
    further: Mapping[int, ImageSet]
    inputs: Mapping[str, Sequence[Any]]
    otherwise: Mapping[str, ImageSet]
    rebuilt: Sequence[np.ndarray] | None
    reconstruction: Mapping[str, Any] | None
    value_range: tuple[float, float]
    once: ImageSet


def checked(config: DictConfig) -> Setup:
    """Load and check everything that an evaluation needs.

    Raises:
        LdmError: a setting that is illegal, or so with this model; a model of another split, of label maps, or of
            another cohort than its networks.
    """
    check_counts(config, "n", "pairs", "batch_size", "sweep_n", "n_ref", *(["repeats"] if config.repeats != 0 else []))
    seeds, goals = generation_seeds(config), check_goals(section(config, "goals"))
    model, path = load_model(config)
    if model.classes is not None:
        raise LdmError(
            f"{path} generates label maps; measure them with ldm segment evaluate=true, see ldm segment --help."
        )
    datamodule = model_cohort(config, model, path)
    cohort = datamodule.cohort
    network = find_features(section(config, "features"), model.device, model.preprocessing)
    if network is not None:
        check_features(network, model.preprocessing, cohort.name, cohort.split_hash)
    sections = plain(config.data).get("instrument")
    instruments = find_instruments(sections, model.preprocessing, datamodule.schema, cohort.split_hash)
    samplers = read_samplers(config, model, seeds[0])
    nulls = not {COVARIATES, "text"} & set(model.unlearned)
    axes = read_sweep(plain(config.sweep), config.sweep_others, model.schema, cohort.split("train"), nulls)
    return Setup(config, model, path, datamodule, network, instruments, samplers, axes, seeds, goals)


def drawn_images(setup: Setup) -> Images:
    """Held-out images, their reconstructions, and samples at their covariates.

    Samples are written to files and read again, and all others are what files would give back: on another grid a file
    loses detail, which must not be what tells samples from real images. Only the first stage's own error is measured
    without files.
    """
    model, n, recipe = setup.model, setup.config.n, setup.model.preprocessing
    real, records = held_out_set(setup.datamodule, recipe.channels, n)
    samples, further = generated(setup, real, records)
    once = samples.first(n)
    inputs = record_inputs(model.header.get("conditioners", {}), [records[i % len(real)] for i in range(n)])
    otherwise = draw_samplers(setup.samplers, model, setup.path, once, inputs)
    rebuilt = reconstructions(model, real.images, real.rows) if model.reconstructs else None
    found = None if rebuilt is None else quality(real.images, rebuilt, recipe.shown_range, records)
    return Images(
        real=replace(real, images=[as_written(recipe, image) for image in real.images]),
        loaded=real.images,
        records=records,
        samples=samples,
        further=further,
        inputs=inputs,
        otherwise=otherwise,
        rebuilt=None if rebuilt is None else [as_written(recipe, image) for image in rebuilt],
        reconstruction=found,
        value_range=recipe.shown_range,
        once=once,
    )


def generated(setup: Setup, real: ImageSet, records: Sequence[Record]) -> tuple[ImageSet, dict[int, ImageSet]]:
    """``n`` samples of every seed, asked with the covariates of held-out subjects in turn.

    Returns:
        ``samples`` and ``further`` of :class:`Images`.
    """
    config = setup.config
    numbers = [i % len(real) for i in range(config.n)] + list(range(min(config.repeats, len(real), config.n)))
    asked = [dict(real.rows[i]) for i in numbers]
    whose = [real.subjects[i] for i in numbers]
    inputs = record_inputs(setup.model.header.get("conditioners", {}), [records[i] for i in numbers])
    first, *others = setup.seeds
    samples = ImageSet(drawn(setup, setup.folder / "samples", asked, inputs, first), asked, whose)
    asked, whose = asked[: config.n], whose[: config.n]
    inputs = {name: values[: config.n] for name, values in inputs.items()}
    further = {
        seed: ImageSet(drawn(setup, setup.folder / f"samples_seed{seed}", asked, inputs, seed), asked, whose)
        for seed in others
    }
    return samples, further


def generation_seeds(config: DictConfig) -> list[int]:
    """Seeds of the noise that samples are drawn with: ``seeds``, or ``seed`` alone.

    Raises:
        LdmError: no list of different whole numbers.
    """
    seeds = plain(config.seeds)
    seeds = [config.seed] if seeds is None else seeds
    legal = isinstance(seeds, list) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not legal or not seeds or len(set(seeds)) < len(seeds):
        raise LdmError(f"seeds is {seeds}; legal: a list of different whole numbers, e.g. [0,1,2].")
    return seeds


def drawn(
    setup: Setup,
    folder: Path,
    asked: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Sequence[Any]] | None = None,
    seed: int | None = None,
) -> list[np.ndarray]:
    """Samples ``(C, *S)`` of one seed, written to ``folder`` (those that are there are kept) and read again."""
    config = setup.config if seed is None else OmegaConf.merge(setup.config, {"seed": seed})
    draw(setup.model, setup.path, folder, asked, config, inputs)
    paths = [image_paths(setup.model, folder, sample_name(i)) for i in range(len(asked))]
    return [read_sample(setup.model, one) for one in paths]
