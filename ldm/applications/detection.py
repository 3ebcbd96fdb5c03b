"""Looks at cases, one after the other and resumably: healthy counterparts, and what they are compared with.

A cohort of volumes does not fit into memory: cases come one by one, and what metrics need of each is kept (`Seen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.applications.anomaly import ROUND_TRIP, DetectionOptions, Detector, anomaly_map, smoothed
from ldm.applications.cases import Case, Truth, load_case
from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.files import write_npz

METHODS = ("partial_noising", "reconstruction")  # arrays of `Found` that the image is compared with, beside `healthy`
STORED = "model_space"  # below the output folder: what was computed, so that an interrupted run goes on


@dataclass(frozen=True)
class Found:
    """What was made of a case, ``(C, *S)`` each; None where it was not asked for.

    Attributes:
        case: the case.
        healthy: its healthy counterpart.
        round_trip: encoded and decoded without guidance: the map at s = 0, and the error of the chain itself.
        partial_noising: unguided, from noise of the same level.
        reconstruction: through the first stage alone; None in pixel space, where that changes nothing.
    """

    case: Case
    healthy: np.ndarray
    round_trip: np.ndarray | None = None
    partial_noising: np.ndarray | None = None
    reconstruction: np.ndarray | None = None


@dataclass(frozen=True)
class Seen:
    """What metrics need of a case.

    Attributes:
        record: of the image.
        mask, diseased: see `Case`.
        maps: ``(*S)`` of each method, by its name: the guide's, those of `METHODS`, those of :func:`intensity_maps`.
        sanity: how much of the map is not the disease, in the model's intensity range; empty without a round trip.
    """

    record: Record
    mask: np.ndarray | None
    diseased: bool | None
    maps: Mapping[str, np.ndarray]
    sanity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What is made beside the healthy counterpart.

    Attributes:
        partial_noising: how; None leaves it out.
        round_trip, reconstruction: whether.
    """

    partial_noising: DetectionOptions | None = None
    round_trip: bool = False
    reconstruction: bool = False


def comparison_of(detector: Detector, options: DetectionOptions, level: float | None = None) -> Comparison:
    """Everything that ``options`` leave to be compared with.

    Args:
        detector: the detector.
        options: of the healthy counterpart.
        level: L of partial noising; None for that of the options.
    """
    noising = DetectionOptions(
        guide="none",
        level=options.level if level is None else level,
        steps=options.steps,
        timestep_spacing=options.timestep_spacing,
        channels=options.channels,
        change=options.change,
        smoothing=options.smoothing,
        score=options.score,
    )
    guided = options.guide != "none"
    return Comparison(noising if guided else None, round_trip=guided, reconstruction=detector.rebuilds)


def look_at(
    detector: Detector,
    records: Sequence[Record],
    truth: Truth,
    options: DetectionOptions,
    folder: Path,
    comparison: Comparison | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Found]:
    """Healthy counterparts of all records, in their order; what ``folder`` has already is not made again.

    Args:
        detector, options: what makes them, and how.
        records: of images on which ``truth`` is known or not.
        folder: of this very request; see `ldm.model.provenance.settle_request`.
        comparison: what to make beside them.
        batch_size: images computed together.
        seed: with an image's number it fixes the noise of partial noising.
        progress: called with the number of finished images.
    """
    comparison = comparison or Comparison()
    folder = Path(folder)
    for start in range(0, len(records), batch_size):
        indices = range(start, min(start + batch_size, len(records)))
        cases = [load_case(records[i], detector.model.preprocessing, truth) for i in indices]
        paths = [folder / f"{case.record.id}.npz" for case in cases]
        todo = [k for k, path in enumerate(paths) if not path.is_file()]
        if todo:
            chosen = [cases[k] for k in todo], [indices[k] for k in todo], [paths[k] for k in todo]
            _make(detector, *chosen, options, comparison, seed)
        for case, path in zip(cases, paths, strict=True):
            yield Found(case, **_read(path))
        progress(len(cases))


def _make(
    detector: Detector,
    cases: Sequence[Case],
    indices: Sequence[int],
    paths: Sequence[Path],
    options: DetectionOptions,
    comparison: Comparison,
    seed: int,
) -> None:
    """Write the arrays ``(C, *S)`` of each case, by their names in `Found`; they are not kept."""
    images = np.stack([case.image for case in cases])  # (B, C, *S)
    scales = [options.scale, *([ROUND_TRIP] if comparison.round_trip else [])]
    made = dict(
        zip(("healthy", "round_trip"), detector.counterparts(images, options, scales, indices, seed), strict=False)
    )
    if comparison.partial_noising is not None:
        (made["partial_noising"],) = detector.counterparts(
            images, comparison.partial_noising, indices=indices, seed=seed
        )
    if comparison.reconstruction:
        made["reconstruction"] = detector.reconstructions(images)
    for k, path in enumerate(paths):
        write_npz(path, {name: array[k].astype(np.float32) for name, array in made.items()})


def look_again(record: Record, preprocessing: Preprocessing, truth: Truth, folder: Path) -> Found:
    """What :func:`look_at` has made of a record and ``folder`` holds."""
    return Found(load_case(record, preprocessing, truth), **_read(Path(folder) / f"{record.id}.npz"))


def map_of(found: Found, options: DetectionOptions, name: str = "healthy") -> np.ndarray:
    """Anomaly map ``(*S)`` against one of the arrays of `Found`."""
    return anomaly_map(found.case.image[None], getattr(found, name)[None], options, found.case.channels)[0]


def summary(found: Found, anomaly: np.ndarray, options: DetectionOptions, channel: int) -> Seen:
    """What metrics need of a case.

    Args:
        found: the case.
        anomaly: its map ``(*S)`` against the healthy counterpart.
        options: of the maps.
        channel: whose intensity is the simplest map of all.
    """
    case, maps, sanity = found.case, {options.guide: anomaly}, {}
    maps |= {name: map_of(found, options, name) for name in METHODS if getattr(found, name) is not None}
    if found.round_trip is not None:
        maps |= {name: one[0] for name, one in intensity_maps(case.image[None], channel, options).items()}
        changed = anomaly_map(found.round_trip[None], found.healthy[None], options, case.channels)  # (1, *S)
        sanity = {
            "error": float(np.abs(case.image - found.round_trip).mean()),
            "unguided": float(map_of(found, options, "round_trip").mean()),
            "guided": float(anomaly.mean()),
            "change_p99": float(np.percentile(changed, 99)),
        }
    return Seen(case.record, case.mask, case.diseased, maps, sanity)


INTENSITIES = ("intensity", "intensity_scaled")


def intensity_maps(images: np.ndarray, channel: int, options: DetectionOptions) -> dict[str, np.ndarray]:
    """The simplest maps of all, ``(N, *S)`` each: one channel of images ``(N, C, *S)``, blurred as other maps are.

    ``intensity`` as it is; ``intensity_scaled`` less the mean, over the standard deviation, of what is brighter than
    the image's mean, as the brightness of scans differs from one to the next. Darker is more where the options say so.
    """
    plain = images[:, channel].astype(np.float32)  # (N, *S), a copy: a view would keep the images
    scaled = np.empty_like(plain)
    for one, image in zip(scaled, plain, strict=True):
        bright = image[image > image.mean()]
        one[...] = (image - bright.mean()) / max(float(bright.std()), 1e-6) if bright.size else 0.0
    sign = -1 if options.change == "darker" else 1
    return {name: sign * smoothed(one, options) for name, one in zip(INTENSITIES, (plain, scaled), strict=True)}


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
