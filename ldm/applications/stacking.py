"""Results of slices as volumes: what was found in the slices of a NIfTI file, put back onto its grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ldm.applications.segmentation import Result, read_result, volumes, write_volumes
from ldm.applications.segmentation_sources import EnsembleSource
from ldm.applications.slicing import FOLDER, named_stacks
from ldm.data import images
from ldm.data.draft import Record
from ldm.data.stacks import Cut, put_back

TABLE = "volumes.tsv"


def stack_results(out: Path, records: Sequence[Record], source: EnsembleSource) -> Path | None:
    """Write the results of slices as NIfTI files beside them, one set for every volume that slices were cut from.

    ``stacked/NAME_dseg.nii.gz`` and the others of :func:`ldm.applications.segmentation.segment`, in the space of the
    volume, and ``stacked/volumes.tsv`` in mm3. Slices that were not segmented are background and count for nothing;
    what is not known of them (mean, variance, entropy) is NaN. Volumes have an interval only where a member is one
    network: members of a diffusion model, or by dropout, are drawn slice by slice, so that sums would seem surer
    than they are.

    Args:
        out: what :func:`ldm.applications.segmentation.segment` wrote.
        records: its subjects.
        source: what drew.

    Returns:
        The folder; None where no record is a slice of a NIfTI file.
    """
    rows = []
    for name, (cut, stack) in named_stacks(records).items():
        results = {index: read_result(out, record, source) for index, record in stack.items()}
        whole = _write_stack(out / FOLDER, name, cut, results, source)
        unknown = {} if source.joint else {"low": None, "high": None}
        rows += [{"participant_id": name, **row, **unknown} for row in volumes(whole, source.classes)]
    if not rows:
        return None
    write_volumes(out / FOLDER / TABLE, rows)
    return out / FOLDER


def _write_stack(folder: Path, name: str, cut: Cut, results: Mapping[int, Result], source: EnsembleSource) -> Result:
    """Write a volume's files; returns labels and members ``([M, ]N, H, W)`` of its N slices, for their volumes."""

    def stored(indices: np.ndarray) -> np.ndarray:
        return source.classes.values_of(torch.from_numpy(indices)).numpy()

    parts = {  # (C, H, W) of a slice
        "dseg": {index: stored(one.labels[None]) for index, one in results.items()},
        "members": {index: stored(one.members) for index, one in results.items()},
        "mean": {index: one.mean.astype(np.float32) for index, one in results.items()},
        "variance": {index: one.variance[None].astype(np.float32) for index, one in results.items()},
        "entropy": {index: one.entropy[None].astype(np.float32) for index, one in results.items()},
    }
    for part, slices in parts.items():
        labels = part in ("dseg", "members")
        volume = put_back(cut.path, cut.plane, slices, 0 if labels else np.nan, labels)
        images.write(folder / f"{name}_{part}.nii.gz", volume)
    indices = np.stack([one.labels for one in results.values()])  # (N, H, W)
    members = np.stack([one.members for one in results.values()], 1)  # (M, N, H, W)
    return Result(indices, members, *[np.empty(0)] * 3, cut.spacing)
