"""Pictures from rows: they measure nothing, and each can be redrawn from the CSV beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
FAR = 3  # times what lies between the quartiles, below the first one: Tukey's "far out"


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


def spectra(panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray]]]], path: Path) -> None:
    """Relative log amplitude against frequency, a panel a network; lines: (name, shares of pi, values)."""
    figure = _figure(4.6 * len(panels), 4.4)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(grid, panels, strict=True):
        stages = [name for name, _, _ in lines if "," not in name]
        colours = need("matplotlib", extra="plots").colormaps["viridis"](np.linspace(0, 0.85, max(len(stages), 1)))
        for name, frequencies, values in lines:
            stage, _, branch = name.partition(", ")
            style = {"": "-", "E-MHSA": "--", "MHCA": ":"}[branch]
            colour = colours[stages.index(stage)] if stage in stages else GREY
            axes.plot(frequencies, values, style, color=colour, lw=1 if branch else 2, label=name)
        axes.set(title=title, xlabel="frequency (pi / pixel of the map)", ylabel="log amplitude, less that of the mean")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # on no line
    _save(figure, path)


def heated(picture: np.ndarray, values: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) under values (H, W) from 0 to 1: blue is little, red is much."""
    colours = need("matplotlib", extra="plots").colormaps["jet"](values)[:, :, :3] * 255
    return Image.fromarray((picture * 0.5 + colours * 0.5).astype(np.uint8))


@dataclass(frozen=True)
class Point:
    """A network in a plot of accuracy against latency."""

    name: str
    family: str  # whose members a line joins
    ratio: float  # its latency / the anchor's
    accuracy: float
    told: str  # of it, where a reader points at it


@dataclass(frozen=True)
class Panel:
    """Networks on one runtime, judged by one accuracy; `row` and `column` are its place in the figure."""

    row: int
    column: int
    runtime: str
    accuracy: str
    points: tuple[Point, ...]


def _families(panel: Panel) -> dict[str, list[Point]]:
    """Members of each family, the fastest first."""
    families: dict[str, list[Point]] = {}
    for point in sorted(panel.points, key=lambda point: point.ratio):
        families.setdefault(point.family, []).append(point)
    return families


def _lowest(panels: Sequence[Panel], row: int) -> float:
    """The accuracy that a row of panels begins at: of the lowest network that is not far below all others."""
    found = [point.accuracy for panel in panels if panel.row == row for point in panel.points]
    first, third = np.percentile(found, [25, 75])
    return min(accuracy for accuracy in found if accuracy >= first - FAR * (third - first))


def trade_off(panels: Sequence[Panel], ours: str, anchor: str, path: Path) -> None:
    """Accuracy against latency relative to the anchor's, as PNG, and beside it as SVG and as a page to point at.

    ours: how the families begin that stand out, each member with its name; others have their family's alone. What lies
    far below all others is a mark at the edge, with its accuracy.
    """
    rows, columns = (1 + max(getattr(panel, side) for panel in panels) for side in ("row", "column"))
    figure = _figure(5.2 * columns, 4.4 * rows)
    names = list(dict.fromkeys(point.family for panel in panels for point in panel.points))
    tab20 = need("matplotlib", extra="plots").colormaps["tab20"].colors
    palette = [*tab20[:2], *tab20[4:]]  # without the two oranges, which are ours
    grid = figure.subplots(rows, columns, squeeze=False)
    empty = {(row, column) for row in range(rows) for column in range(columns)}
    for panel in panels:
        empty.discard((panel.row, panel.column))
        axes = grid[panel.row][panel.column]
        for family, members in _families(panel).items():
            own = family.startswith(ours)
            line = [m.ratio for m in members], [m.accuracy for m in members]
            colour = ORANGE if own else palette[names.index(family) % len(palette)]
            axes.plot(*line, color=colour, marker="o", ms=5 if own else 3, lw=2 if own else 0.8, zorder=2 + own)
            for m in members if own else members[-1:]:
                place = {"xy": (m.ratio, m.accuracy), "xytext": (3, 3), "textcoords": "offset points"}
                axes.annotate(m.name if own else family, size=7, color=colour, **place)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        axes.set(title=panel.runtime, xlabel=f"latency / {anchor}'s", ylabel=panel.accuracy)
        axes.spines[["top", "right"]].set_visible(False)
        lowest, highest = _lowest(panels, panel.row), max(point.accuracy for point in panel.points)
        if below := [point for point in panel.points if point.accuracy < lowest]:
            edge = lowest - 0.05 * (highest - lowest)
            axes.set_ylim(bottom=edge)
            for m in below:
                axes.plot(m.ratio, edge, "v", color=GREY, ms=5, clip_on=False)
                place = {"xy": (m.ratio, edge), "xytext": (5, 4), "textcoords": "offset points"}
                axes.annotate(f"{m.name} {m.accuracy:g}", size=7, color=GREY, **place)
    for row, column in empty:
        grid[row][column].set_visible(False)
    _save(figure, path)
    same = {"svg.hashsalt": path.stem}  # drawn again, the file is the same
    with need("matplotlib", extra="plots").rc_context(same), replacing(path.with_suffix(".svg")) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Date": None})
    _trade_off_page(panels, ours, anchor, (rows, columns), path.with_suffix(".html"))


def _trade_off_page(panels: Sequence[Panel], ours: str, anchor: str, shape: tuple[int, int], path: Path) -> None:
    """The same as one HTML file, which needs nothing else: families can be hidden, points tell what they are."""
    graphs: Any = need("plotly.graph_objects", extra="plots")
    titles = {(panel.row, panel.column): panel.runtime for panel in panels}
    figure = need("plotly.subplots", extra="plots").make_subplots(
        *shape, subplot_titles=[titles.get((r, c), "") for r in range(shape[0]) for c in range(shape[1])]
    )
    palette = need("plotly.colors", extra="plots").qualitative.Dark24
    names = list(dict.fromkeys(point.family for panel in panels for point in panel.points))
    shown: set[str] = set()
    for panel in panels:
        place = {"row": panel.row + 1, "col": panel.column + 1}
        for family, members in _families(panel).items():
            own = family.startswith(ours)
            line = graphs.scatter.Line(
                color=ORANGE if own else palette[names.index(family) % len(palette)], width=3 if own else 1
            )
            trace = graphs.Scatter(
                x=[m.ratio for m in members],
                y=[m.accuracy for m in members],
                text=[f"<b>{m.name}</b><br>{m.told}" for m in members],
                hoverinfo="text",
                mode="lines+markers",
                line=line,
                marker={"size": 9 if own else 6},
                name=family,
                legendgroup=family,
                showlegend=family not in shown,
            )
            shown.add(family)
            figure.add_trace(trace, **place)
        figure.update_xaxes(type="log", title=f"latency / {anchor}'s", **place)
        figure.update_yaxes(title=panel.accuracy, **place)
    figure.update_layout(template="simple_white", width=460 * shape[1] + 200, height=400 * shape[0])
    with replacing(path) as unfinished:
        figure.write_html(unfinished, include_plotlyjs=True, full_html=True)
