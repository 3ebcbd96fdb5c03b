"""Pictures of a run: slice mosaics, reconstruction panels, curves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def views(image: np.ndarray) -> list[np.ndarray]:
    """Pictures of one channel: the three centre planes of a volume ``(D, H, W)``, upright; a slice as it is.

    Planes of a RAS volume come as axial, coronal, sagittal, with anterior or superior up.
    """
    if image.ndim == 2:
        return [image]
    i, j, k = (length // 2 for length in image.shape)
    return [np.rot90(image[:, :, k]), np.rot90(image[:, j, :]), np.rot90(image[i, :, :])]


def mosaic(
    images: Sequence[np.ndarray],
    path: Path,
    titles: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    columns: int = 4,
    rgb: bool = False,
) -> Path:
    """Images ``(C, *S)`` side by side, first channel, each with its centre planes in a row.

    Args:
        titles: one an image.
        value_range: black and white; None takes each image's own.
        columns: images a row.
        rgb: the three channels are the colours of a picture.
    """
    strips = [_colours(image, value_range) if rgb else _strip(image[0]) for image in images]
    rows = -(-len(strips) // columns)
    width = 1.5 * max(strip.shape[1] / strip.shape[0] for strip in strips)
    figure = Figure(figsize=(width * columns, 1.75 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = value_range or (None, None)
    for n, axis in enumerate(axes.flat):
        axis.axis("off")
        if n < len(strips):
            axis.imshow(strips[n], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            if titles is not None:
                axis.set_title(titles[n], fontsize=7, pad=2)
    return _save(figure, path)


def mosaic_rows(
    rows: Mapping[str, Sequence[np.ndarray]],
    path: Path,
    titles: Sequence[str],
    value_range: tuple[float, float] | None = (0.0, 1.0),
    rgb: bool = False,
) -> Path:
    """A named row of images ``(C, *S)`` for each set, first channel, with its centre planes; columns belong together.

    Args:
        rows: name -> images, the same number in each.
        titles: one a column.
        value_range: black and white; None takes each image's own.
        rgb: the three channels are the colours of a picture.
    """
    strips = [[_colours(image, value_range) if rgb else _strip(image[0]) for image in row] for row in rows.values()]
    height, width = strips[0][0].shape[:2]
    figure = Figure(figsize=(1.2 * width / height * len(titles) + 1, 1.25 * len(strips) + 0.2))
    axes = figure.subplots(len(strips), len(titles), squeeze=False)
    low, high = value_range or (None, None)
    for name, line, images in zip(rows, axes, strips, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=7)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=6, pad=2)
    return _save(figure, path)


def reconstruction_panel(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    path: Path,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    rgb: bool = False,
) -> Path:
    """Image, reconstruction and their difference, a row a case; first channel, or colours and their mean difference."""
    low, high = value_range or (float(pairs[0][0].min()), float(pairs[0][0].max()))
    limit = 0.25 * (high - low)
    if rgb:
        strips = [(*(_colours(z, (low, high)) for z in (x, y)), _strip((y - x).mean(0), 0.0)) for x, y in pairs]
    else:
        strips = [(_strip(x[0]), _strip(y[0]), _strip(y[0] - x[0], 0.0)) for x, y in pairs]
    aspect = strips[0][0].shape[1] / strips[0][0].shape[0]
    figure = Figure(figsize=(3 * 1.7 * aspect, 1.8 * len(strips)))
    axes = figure.subplots(len(strips), 3, squeeze=False)
    for row, strip in zip(axes, strips, strict=True):
        for axis, part in zip(row[:2], strip[:2], strict=True):
            axis.imshow(part, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        row[2].imshow(strip[2], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for axis, title in zip(axes[0], ("image", "reconstruction", f"difference (+-{limit:g})"), strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    return _save(figure, path)


def table_of_pictures(
    rows: Sequence[Sequence[np.ndarray | None]],
    path: Path,
    titles: Sequence[str],
    limits: Sequence[tuple[float, float]],
    colours: Sequence[str],
    names: Sequence[str] | None = None,
) -> Path:
    """A row a case, a column a kind of picture ``(*S)`` with limits of its own; volumes by their centre planes.

    Args:
        rows: pictures of one channel; None leaves a place empty.
        titles: of the columns.
        limits: black and white, or the ends of the colour map, of each column.
        colours: matplotlib's colour map of each column.
        names: of the rows.
    """
    strips = [[None if picture is None else _strip(picture) for picture in row] for row in rows]
    aspect = strips[0][0].shape[1] / strips[0][0].shape[0]
    figure = Figure(figsize=(1.7 * aspect * len(titles), 1.85 * len(rows)))
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (drawn, of_row) in enumerate(zip(axes, strips, strict=True)):
        for axis, strip, title, (low, high), colour in zip(drawn, of_row, titles, limits, colours, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if strip is not None:
                axis.imshow(strip, cmap=colour, vmin=low, vmax=high, interpolation="nearest")
            if row == 0:
                axis.set_title(title, fontsize=8)
        if names is not None:
            drawn[0].set_ylabel(names[row], fontsize=6)
    return _save(figure, path)


def curves(metrics: Mapping[str, Sequence[tuple[int, float]]], names: Sequence[str], path: Path) -> Path:
    """One small plot a metric against optimisation steps; metrics that were never logged are left out."""
    names = [name for name in names if name in metrics]
    figure = Figure(figsize=(3.4 * max(1, len(names)), 2.6))
    axes = figure.subplots(1, max(1, len(names)), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        steps, values = zip(*metrics[name], strict=True)
        axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 40 else None)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if "loss" in name and min(values) > 0:
            axis.set_yscale("log")
    return _save(figure, path)


def scatter(
    asked: Sequence[float],
    measured: Sequence[float],
    title: str,
    unit: str,
    path: Path,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Asked against measured, with the identity line; ``limits`` of both axes, so that pictures can be compared."""
    figure = Figure(figsize=(3.6, 3.4))
    axis = figure.subplots()
    axis.scatter(asked, measured, s=10, alpha=0.7)
    ends = limits or (min(*asked, *measured), max(*asked, *measured))
    axis.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"asked ({unit})", fontsize=8)
    axis.set_ylabel(f"measured ({unit})", fontsize=8)
    axis.set_title(title, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    return _save(figure, path)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    path: Path,
    diagonal: bool = False,
) -> Path:
    """Several curves in one plot; points of NaN are left out. ``diagonal`` draws the identity from 0 to 1."""
    figure = Figure(figsize=(4.2, 3.4))
    axis = figure.subplots()
    if diagonal:
        axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    for name, (x, y) in series.items():
        axis.plot(x, y, marker=".", linewidth=1, label=name)
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return _save(figure, path)


def segmentation_panel(rows: Sequence[Mapping[str, np.ndarray | None]], names: Sequence[str], path: Path) -> Path:
    """A row an image, a column each of what is known of it.

    Args:
        rows: title of the column -> ``(*S)``; the same columns in every row. None leaves a place empty, and a column
            that has nothing else is left out. Label maps (``truth``, ``segmentation``) in colours, ``mean`` from 0 to
            1, ``variance`` up to the 0.25 of two opposite halves, others as they are.
        names: one a row.
    """
    limits = {"mean": (0.0, 1.0), "variance": (0.0, 0.25)}
    columns = [title for title in rows[0] if any(row[title] is not None for row in rows)]
    first = _strip(next(iter(rows[0].values())))
    width = 1.5 * first.shape[1] / first.shape[0]
    figure = Figure(figsize=(width * len(columns), 1.7 * len(rows)))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row, name in zip(axes, rows, names, strict=True):
        for axis, title in zip(line, columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if row[title] is None:
                continue
            labels = title in ("truth", "segmentation")
            low, high = (0, 9) if labels else limits.get(title, (None, None))
            colours = "tab10" if labels else "magma" if title == "variance" else "gray"
            shown = _strip(row[title])
            axis.imshow(np.ma.masked_equal(shown, 0) if labels else shown, cmap=colours, vmin=low, vmax=high)
            axis.set_facecolor("black")
        line[0].set_ylabel(name[-24:], fontsize=5)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    return _save(figure, path)


def sweep(
    asked: Sequence[float],
    measured: np.ndarray,
    training: tuple[float, float],
    name: str,
    unit: str,
    path: Path,
) -> Path:
    """Asked against measured ``(K, S)`` with S fixed noises, a thin line each, and their mean.

    What lies outside the ``training`` range is shaded and says that it is extrapolation.
    """
    figure = Figure(figsize=(5.2, 3.6))
    axis = figure.subplots()
    axis.plot(asked, measured, color="tab:blue", linewidth=0.6, alpha=0.5)
    known = np.isfinite(measured)
    mean = np.where(known, measured, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)  # (K,)
    axis.plot(asked, mean, color="tab:blue", linewidth=2, marker="o", label="mean of the noises")
    axis.plot([asked[0], asked[-1]], [asked[0], asked[-1]], "k--", linewidth=0.8, label="as asked")
    axis.set_xlim(asked[0], asked[-1])
    for start, end in ((asked[0], min(training[0], asked[-1])), (max(training[1], asked[0]), asked[-1])):
        if start < end:
            axis.axvspan(start, end, color="tab:orange", alpha=0.18, linewidth=0)
            middle = ((start + end) / 2, 0.98)
            style = {"rotation": 90, "fontsize": 8, "ha": "center", "va": "top", "color": "#8a4b00"}
            axis.text(*middle, "extrapolation", transform=axis.get_xaxis_transform(), **style)
    axis.set_xlabel(f"{name} asked ({unit})", fontsize=8)
    axis.set_ylabel(f"{name} measured ({unit})", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")
    return _save(figure, path)


def copy(picture: Path, path: Path) -> Path:
    """Copy a picture, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    shutil.copyfile(picture, temporary)
    temporary.replace(path)
    return path


def _strip(image: np.ndarray, fill: float | None = None) -> np.ndarray:
    parts = views(image)
    height = max(part.shape[0] for part in parts)
    value = float(image.min()) if fill is None else fill
    padded = []
    for part in parts:
        above = (height - part.shape[0]) // 2
        padded.append(np.pad(part, ((above, height - part.shape[0] - above), (0, 1)), constant_values=value))
    return np.concatenate(padded, axis=1)


def _colours(image: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """An RGB picture ``(3, H, W)`` as ``(H, W + 1, 3)`` in 0..1."""
    low, high = value_range or (float(image.min()), float(image.max()))
    strip = np.stack([_strip(channel) for channel in image], axis=-1)  # (H, W + 1, 3)
    return np.clip((strip - low) / max(high - low, 1e-12), 0.0, 1.0)


def _save(figure: Figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(pad=0.4)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
    return path
