"""Pictures from rows: they measure nothing, and each can be redrawn from the CSV beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nextvit.benchmark import CONFIDENCE, Row
from nextvit.extras import need
from nextvit.files import replacing

if TYPE_CHECKING:  # it needs the libraries that training needs
    from nextvit.loading import Loading

BLUE, ORANGE, GREY, RED = "#1f5fa8", "#e07b28", "#8a8f98", "#c0392b"


def _figure(width: float, height: float) -> Any:
    """A figure of its own: no global state, no window."""
    figure = need("matplotlib.figure", extra="plots").Figure(figsize=(width, height), dpi=120, layout="constrained")
    need("matplotlib.backends.backend_agg", extra="plots").FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")


def curves(history: Sequence[dict[str, float]], kept: int, score: str, name: str, path: Path) -> None:
    """Losses and the score by epoch (rows of metrics.csv); `kept` is the index of the epoch whose weights are."""
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for column, colour, label in (("train_loss", ORANGE, "train, as trained"), ("val_loss", BLUE, "val")):
        if column in history[0]:
            left.plot(epochs, [row[column] for row in history], color=colour, marker="o", ms=3, label=label)
    left.set(xlabel="epoch", ylabel="loss")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(epochs, [row[score] for row in history], color=BLUE, marker="o", ms=3)
    row = history[kept]
    right.plot(row["epoch"], row[score], color=ORANGE, marker="o", ms=6)
    right.set(xlabel="epoch", ylabel=name, title=f"kept: {row[score]:.1f} %, epoch {row['epoch']:.0f}")
    for axes in (left, right):
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def confusion(matrix: np.ndarray, labels: Sequence[str], title: str, path: Path) -> None:
    """A confusion matrix (rows: truth, columns: answers) in percent of each row; figures where they can be read."""
    shares = 100.0 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = float(np.clip(0.55 * len(labels) + 2, 4, 12))
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set(title=title, xlabel="answer", ylabel="truth")
    if len(labels) <= 30:
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        for (y, x), share in np.ndenumerate(shares):
            if share >= 1:
                axes.text(
                    x, y, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "black", size=8
                )
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    _save(figure, path)


def precision(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Precision at each recall, at an overlap of a half; a line a kind of object (box, mask)."""
    figure = _figure(5, 3.6)
    axes = figure.subplots()
    for kind, colour in zip([key for key in rows[0] if key != "recall"], (BLUE, ORANGE), strict=False):
        axes.plot([100 * row["recall"] for row in rows], [row[kind] for row in rows], color=colour, label=kind)
    axes.set(xlabel="recall (%)", ylabel="precision (%)", title=f"{title}: IoU 0.5", xlim=(0, 100), ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def latency(rows: Sequence[Row], path: Path) -> None:
    """A bar a row: the median, with the middle half of the rounds as a whisker."""
    several = len({row.model for row in rows}) > 1
    batches, threads = {row.batch for row in rows}, {row.setup.threads for row in rows}
    names = [
        f"{row.model}\n" * several
        + f"{row.setup.runtime}, {row.setup.precision}"
        + f", batch {row.batch}" * (len(batches) > 1)
        + f", {row.setup.threads} threads" * (len(threads) > 1)
        for row in rows
    ]
    spreads = [(row.p25_ms / row.batch, row.median_ms / row.batch, row.p75_ms / row.batch) for row in rows]
    notes = [f"{median:.2f} ms   x {row.ratio:.2f}" for row, (_, median, _) in zip(rows, spreads, strict=True)]
    notes = [note + _interval(row) * bool(i) for i, (note, row) in enumerate(zip(notes, rows, strict=True))]
    first = rows[0]
    fixed = f", batch {first.batch}" * (len(batches) == 1) + f", {first.setup.threads} threads" * (len(threads) == 1)
    told = f"ms for an image of {first.image_size} px{fixed}; ratio to the first row with its {CONFIDENCE:.0%} interval"
    best = min(range(len(rows)), key=lambda i: spreads[i][1])
    _bars(names, spreads, notes, told, path, best=best, small=several)


def loading(rows: "Sequence[Loading]", path: Path) -> None:
    """The same of how fast images are loaded."""
    names = [_loaded_by(row.workers) for row in rows]
    spreads = [(row.p25, row.images_per_s, row.p75) for row in rows]
    notes = [f"{row.images_per_s:.0f}   x {row.ratio:.2f}" + _interval(row) * bool(i) for i, row in enumerate(rows)]
    told = f"images a second; ratio to the first row with its {CONFIDENCE:.0%} interval"
    _bars(names, spreads, notes, told, path, best=max(range(len(rows)), key=lambda i: spreads[i][1]))


def _loaded_by(workers: int) -> str:
    return f"{workers} loading process{'es' * (workers > 1)}" if workers else "the training process itself"


def _interval(row: "Row | Loading") -> str:
    return f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"


def _bars(
    names: Sequence[str],
    spreads: Sequence[tuple[float, float, float]],
    notes: Sequence[str],
    label: str,
    path: Path,
    *,
    best: int,
    small: bool = False,
) -> None:
    """Horizontal bars of medians; spreads: lower quartile, median, upper quartile of each; `best` stands out."""
    figure = _figure(9.5, 0.55 * len(names) + 1.4)
    axes = figure.subplots()
    low, medians, high = zip(*spreads, strict=True)
    whiskers = [np.subtract(medians, low), np.subtract(high, medians)]
    colours = [ORANGE if index == best else BLUE for index in range(len(names))]
    axes.barh(range(len(names)), medians, xerr=whiskers, color=colours, ecolor=GREY, capsize=3, height=0.6)
    axes.set_yticks(range(len(names)), names, size=8 if small else 10)
    axes.invert_yaxis()
    for index, note in enumerate(notes):
        axes.annotate(note, (high[index], index), (6, 0), textcoords="offset points", va="center", size=9)
    axes.set_xlim(right=max(high) * 1.6)
    axes.set(xlabel=label)
    axes.xaxis.label.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def samples(
    images: Sequence[Image.Image],
    captions: Sequence[tuple[str, bool]],
    path: Path,
    *,
    legend: Mapping[str, Sequence[int]] | None = None,
    columns: int = 8,
) -> None:
    """Images with a caption each, red where it is wrong: (text, right). legend: names and their colours, 0 to 255."""
    rows = -(-len(images) // columns)
    figure = _figure(1.45 * columns, 1.85 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, (text, right) in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image)
        axes.set_title(text, size=8, color="black" if right else RED)
    if legend:
        patch = need("matplotlib.patches", extra="plots").Patch
        patches = [patch(color=[level / 255 for level in colour], label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    _save(figure, path)


def trade_off(panels: Sequence[tuple[str, str, Sequence[tuple[str, float, float]]]], path: Path) -> None:
    """Accuracy against latency, as PNG and as SVG beside it; panels: (runtime, accuracy, (name, ms, value) a network).

    Networks of one family, by the first word of their names, are a line; Next-ViT's stands out.
    """
    columns = min(3, len(panels))
    figure = _figure(5.4 * columns, 4.2 * -(-len(panels) // columns))
    grid = np.atleast_1d(figure.subplots(-(-len(panels) // columns), columns, squeeze=False)).ravel()
    for axes, (runtime, accuracy, points) in zip(grid, panels, strict=False):
        families: dict[str, list[tuple[float, float, str]]] = {}
        for name, ms, value in points:
            families.setdefault(name.split("-")[0].split(" ")[0].rstrip("0123456789"), []).append((ms, value, name))
        for family, members in families.items():
            own = family == "Next"
            members.sort()
            colour = ORANGE if own else BLUE
            line = [ms for ms, _, _ in members], [value for _, value, _ in members]
            axes.plot(*line, color=colour, marker="o", ms=5 if own else 3, lw=2 if own else 0.8, zorder=2 + own)
            for x, y, name in members:
                axes.annotate(name, (x, y), (3, 3), textcoords="offset points", size=6, color=colour if own else GREY)
        axes.set_xscale("log")
        axes.set(title=runtime, xlabel="ms for one image", ylabel=accuracy)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _save(figure, path)
    with replacing(path.with_suffix(".svg")) as unfinished:
        figure.savefig(unfinished, format="svg")
