"""What a person reads after a run: plots with their CSV beside them, latency tables, and HTML."""

import base64
import csv
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nextvit import plots
from nextvit.benchmark import CONFIDENCE, Row
from nextvit.data.check import LISTED, Checked
from nextvit.data.images import printable
from nextvit.describe import table
from nextvit.evaluate import AnyEvaluation, Evaluation, MaskEvaluation, ObjectEvaluation
from nextvit.exporters.export import ExportReport
from nextvit.exporters.object_parity import FEWEST, ObjectParity
from nextvit.exporters.parity import Parity
from nextvit.files import write_rows, write_text
from nextvit.metadata import Preprocess
from nextvit.metrics import BINS, kept_epoch
from nextvit.runtime.session import Setup
from nextvit.tasks.segment import View

if TYPE_CHECKING:  # they need the libraries that training needs
    from nextvit.loading import ImageParts, Loading
    from nextvit.recipe import Recipe

SHOWN = 5  # examples of a finding on a terminal
SCORES = {  # that a run is judged by
    Evaluation: ("top1", "val top-1 (%)"),
    MaskEvaluation: ("miou", "val mIoU (%)"),
    ObjectEvaluation: ("box_ap", "val box AP (%)"),
}


def write_run_plots(run: Path, result: AnyEvaluation) -> None:
    """plots/: learning curves (their numbers are metrics.csv), and on `val` the confusion matrix, or of detection the
    precision, with its CSV.
    """
    title = f"best checkpoint on {result.split.name}"
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        history = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    score, name = SCORES[type(result)]
    images = len(result.split) - len(result.rejected)
    kept = kept_epoch([max(row[f"val_{score}"], row.get(f"ema_{score}", 0.0)) for row in history], images)
    plots.curves(history, kept, f"val_{score}", name, run / "plots" / "curves.png")
    if isinstance(result, MaskEvaluation):
        write_mask_evaluation(result, run / "plots", title)
    elif isinstance(result, ObjectEvaluation):
        write_object_evaluation(result, run / "plots", title)
    else:
        write_confusion(result, run / "plots" / "confusion.png", title)


def mask_evaluation_lines(result: MaskEvaluation, p: Preprocess, view: View, setup: Setup) -> list[str]:
    """What an evaluation of segmentation came to, for a terminal."""
    m = result.metrics
    edges = f", of boundaries {m.boundary_miou:.2f} %" if m.boundary else ""
    worst = sorted((iou, label) for label, iou in zip(result.split.labels, m.ious, strict=True) if iou is not None)
    looked = f"windows of {view.window} pixels" if view.window else "whole images"
    if view.scales != (1.0,) or view.flip:
        scales = ", ".join(f"{scale:g}" for scale in view.scales)
        looked += f", scales {scales}{', each mirrored too' if view.flip else ''}"
    return [
        f"mIoU {m.miou:.2f} %{edges}, pixel accuracy {m.accuracy:.2f} % ({len(worst)} classes)",
        "least right: " + ", ".join(f"{printable(label)} {iou:.1f} %" for iou, label in worst[:3]),
        f"{len(result.split) - len(result.rejected)} images of {result.split.name}, {len(result.rejected)} left out; "
        f"{looked}, resized to fit {p.long_side} x {p.image_size}; {setup.runtime}, {setup.device}, {setup.precision}",
    ]


def write_mask_evaluation(result: MaskEvaluation, folder: Path, title: str = "pixels") -> None:
    """confusion.png and .csv of pixels, and classes.csv."""
    m = result.metrics
    _write_matrix(m.confusion, result.split.labels, folder / "confusion.png", f"{title}: mIoU {m.miou:.1f} %")
    pixels, answers = m.confusion.sum(1), m.confusion.sum(0)
    write_rows(
        folder / "classes.csv",
        [
            {"class": printable(label), "pixels": int(t), "answered": int(a), "iou": "" if i is None else round(i, 4)}
            for label, t, a, i in zip(result.split.labels, pixels, answers, m.ious, strict=True)
        ],
    )


def object_evaluation_lines(result: ObjectEvaluation, p: Preprocess, setup: Setup) -> list[str]:
    """What an evaluation of detection came to, for a terminal."""
    lines = table(score_rows(result))
    box = result.metrics.scores["box"]
    worst = sorted((ap, label) for ap, label in zip(box.per_class, result.split.labels, strict=True) if ap is not None)
    if len(worst) > 1:
        lines.append("least box AP: " + ", ".join(f"{printable(label)} {ap:.1f} %" for ap, label in worst[:3]))
    if not result.metrics.masks:
        lines.append("the objects have no masks, so there is no AP of masks")
    return [
        *lines,
        f"{len(result.split) - len(result.rejected)} images of {result.split.name} with {len(result.metrics.truth)} "
        f"objects, {len(result.rejected)} left out; resized to fit {p.long_side} x {p.image_size}; {setup.runtime}, "
        f"{setup.device}, {setup.precision}",
    ]


def score_rows(result: ObjectEvaluation) -> list[dict[str, object]]:
    """COCO's twelve numbers, of boxes and of masks; "-" where no object counts."""
    names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium"}
    names |= {"ap_large": "large", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100"}
    rows: list[dict[str, object]] = []
    for kind, scores in result.metrics.scores.items():
        cells = {shown: getattr(scores, name) for name, shown in names.items()}
        rows.append({"of": kind, **{k: "-" if v is None else f"{v:.2f}" for k, v in cells.items()}})
    return rows


def write_object_evaluation(result: ObjectEvaluation, folder: Path, title: str = "detections") -> None:
    """precision.png and .csv, classes.csv, and detections.json as COCO's results."""
    scores = result.metrics.scores
    rows = [
        {"recall": recall / 100, **{kind: round(s.precision50[recall], 4) for kind, s in scores.items()}}
        for recall in range(101)
    ]
    write_rows(folder / "precision.csv", rows)
    plots.precision(rows, title, folder / "precision.png")
    write_text(folder / "detections.json", json.dumps(result.metrics.found))
    columns = [scores[kind].per_class for kind in scores]
    counts = Counter(entry["category_id"] for entry in result.metrics.truth)
    write_rows(
        folder / "classes.csv",
        [
            {"class": printable(label), "objects": counts[number]}
            | {f"{kind}_ap": "" if ap is None else round(ap, 4) for kind, ap in zip(scores, aps, strict=True)}
            for label, number, *aps in zip(result.split.labels, result.split.category_ids, *columns, strict=True)
        ],
    )


def write_confusion(result: Evaluation, path: Path, title: str) -> None:
    """The matrix as a picture, and as a CSV of counts beside it: a row a true class."""
    _write_matrix(result.metrics.confusion, result.split.labels, path, f"{title}: top-1 {result.metrics.top1:.1f} %")


def _write_matrix(matrix: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
    labels = [printable(name) for name in names]
    plots.confusion(matrix, labels, title, path)
    rows = [
        {"truth": label, **dict(zip(labels, map(int, counts), strict=True))}
        for label, counts in zip(labels, matrix, strict=True)
    ]
    write_rows(path.with_suffix(".csv"), rows)


def evaluation_lines(results: Sequence[tuple[Preprocess, Evaluation]], setup: Setup) -> list[str]:
    """What an evaluation came to, at one test size or several, for a terminal."""
    p, first = results[0]
    m = first.metrics
    if len(results) > 1:
        lines = table([_evaluation_row(p, result) for p, result in results])
    else:
        lines = [
            f"top-1 {m.top1:.2f} % (standard error {m.standard_error:.2f}, {m.images} images)",
            f"top-5 {m.top5:.2f} %, loss {m.loss:.4f}, calibration error {m.calibration_error:.2f} points",
        ]
        if first.real is not None:
            lines.append(
                f"by ImageNet-ReaL's labels: {first.real_top1:.2f} % of the {first.real[1]} images that have some"
            )
    worst = sorted(
        (recall, label) for label, recall in zip(first.split.labels, m.recalls, strict=True) if recall is not None
    )
    if len(worst) > 1:
        lines.append("least right: " + ", ".join(f"{printable(label)} {recall:.1f} %" for recall, label in worst[:3]))
    return [
        *lines,
        f"{m.images} images of {first.split.name}, {len(first.rejected)} left out; resized to {p.resize_size}, cut to "
        f"{p.image_size}; {setup.runtime}, {setup.device}, {setup.precision}",
    ]


def _evaluation_row(p: Preprocess, result: Evaluation) -> dict[str, object]:
    m = result.metrics
    return {
        "size": p.image_size,
        "resized to": p.resize_size,
        "top-1": f"{m.top1:.2f} %",
        "standard error": f"{m.standard_error:.2f}",
        "top-5": f"{m.top5:.2f} %",
        "loss": f"{m.loss:.4f}",
        "calibration error": f"{m.calibration_error:.2f}",
        **({} if result.real_top1 is None else {"ReaL": f"{result.real_top1:.2f} %"}),
    }


def write_evaluation(results: Sequence[tuple[Preprocess, Evaluation]], folder: Path) -> None:
    """confusion.png and .csv, classes.csv and reliability.csv of the first size; sizes.csv of all."""
    _, first = results[0]
    m = first.metrics
    write_confusion(first, folder / "confusion.png", f"answers on {first.split.name}")
    images = m.confusion.sum(1)
    labels = [printable(label) for label in first.split.labels]
    write_rows(
        folder / "classes.csv",
        [
            {"class": label, "images": int(count), "recall": "" if recall is None else round(recall, 4)}
            for label, count, recall in zip(labels, images, m.recalls, strict=True)
        ],
    )
    write_rows(
        folder / "reliability.csv",
        [
            {"from": n / BINS, "to": (n + 1) / BINS, "images": int(count), "probability": total, "right": right}
            for n, (count, total, right) in enumerate(m.reliability)
        ],
    )
    write_rows(folder / "sizes.csv", [{**vars(p), **_figures(result)} for p, result in results])


def _figures(result: Evaluation) -> dict[str, object]:
    return {key: value for key, value in result.to_dict().items() if isinstance(value, int | float)}


def latency_records(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Rows of a latency table, every figure with what it was measured on."""
    return [
        {
            "model": row.model,
            "runtime": row.setup.runtime,
            "device": row.setup.device,
            "precision": row.setup.precision,
            "threads": row.setup.threads,
            "batch": row.batch,
            "image_size": row.image_size,
            "median_ms": round(row.median_ms, 3),
            "p25_ms": round(row.p25_ms, 3),
            "p75_ms": round(row.p75_ms, 3),
            "images_per_s": round(row.images_per_s, 1),
            "ratio": round(row.ratio, 3),
            "ratio_low": round(row.ratio_low, 3),
            "ratio_high": round(row.ratio_high, 3),
            **({} if row.footprint is None else asdict(row.footprint)),
            **({} if row.pipeline is None else asdict(row.pipeline)),
        }
        for row in rows
    ]


def latency_lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    first = rows[0]
    shown = [
        {
            **_row_names(row),
            "batch": row.batch,
            "ms": f"{row.median_ms:.2f} ({row.p25_ms:.2f} to {row.p75_ms:.2f})",
            "images/s": f"{row.images_per_s:.1f}",
            "ratio": f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})" if row is not first else "1",
        }
        for row in rows
    ]
    lines = [
        *table(shown),
        f"{first.image_size} x {first.image_size} pixels; ms: for a batch, median and middle half of {first.rounds} "
        "interleaved rounds;",
        f"ratio: time for an image / the first row's in the same round, with a {CONFIDENCE:.0%} interval of its median",
    ]
    if first.pipeline is not None:
        lines += ["", *table([_pipeline_cells(row) for row in rows if row.batch == first.batch])]
        lines.append(f"ms for one image at a time, median of {first.pipeline.images} images from files")
    if first.footprint is not None:
        lines += ["", *table([_footprint_cells(row) for row in rows])]
        lines.append(
            "load: opening and the first answer, libraries there already; memory: added to the peak on the host"
        )
    return lines


def loading_lines(rows: "Sequence[Loading]", parts: "ImageParts", recipe: "Recipe", rounds: int) -> list[str]:
    """The table of `benchmark --data` for a terminal."""
    shown = [
        {
            "loading processes": row.workers,
            "images/s": f"{row.images_per_s:.0f} ({row.p25:.0f} to {row.p75:.0f})",
            "ratio": f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row is not rows[0] else "1",
        }
        for row in rows
    ]
    return [
        *table(shown),
        f"{recipe.side} x {recipe.side} pixels; median and middle half of {rounds} interleaved rounds; "
        f"ratio: to the first row's rate in the same round, with a {CONFIDENCE:.0%} interval of its median",
        f"an image, in one process: {parts.read_ms:.2f} ms to read and decode, {parts.augment_ms:.2f} ms to augment "
        f"(median of {parts.images})",
    ]


def write_loading(rows: "Sequence[Loading]", path: Path) -> None:
    """The table as CSV, and a plot beside it."""
    write_rows(path, [row.to_dict() for row in rows])
    plots.loading(rows, path.with_suffix(".png"))


def _pipeline_cells(row: Row) -> dict[str, object]:
    p = row.pipeline
    assert p is not None
    parts = {"decode": p.decode_ms, "preprocess": p.preprocess_ms, "forward": p.forward_ms, "post": p.post_ms}
    shown = {name: f"{value:.2f}" for name, value in parts.items()}
    return {**_row_names(row), **shown, "whole": f"{sum(parts.values()):.2f}"}


def _footprint_cells(row: Row) -> dict[str, object]:
    f = row.footprint
    assert f is not None
    return {
        **_row_names(row),
        "batch": row.batch,
        "file": "-" if f.file_mb is None else f"{f.file_mb:.1f} MB",
        "load": f"{f.load_s:.2f} s",
        "memory": "-" if f.memory_mb is None else f"{f.memory_mb:.0f} MB",
    }


def _row_names(row: Row) -> dict[str, object]:
    return {
        "model": row.model,
        "runtime": f"{row.setup.runtime}, {row.setup.device}",
        "precision": row.setup.precision,
        "threads": row.setup.threads,
    }


def write_latency(rows: Sequence[Row], path: Path) -> None:
    """The table as CSV, and as bars beside it."""
    write_rows(path, latency_records(rows))
    plots.latency(rows, path.with_suffix(".png"))


def export_lines(report: ExportReport) -> list[str]:
    """What an export came to, for a terminal."""
    head = f"{report.path} ({report.bytes / 1e6:.1f} MB, {report.seconds:.0f} s)"
    lines = [head]
    if isinstance(report.parity, ObjectParity):
        lines = _object_parity_lines(head, report.parity)
    elif report.parity is not None:
        lines = _parity_lines(head, report.parity)
    if report.stages:
        rows = [
            {
                "after": stage.name,
                "largest difference": f"{stage.max_abs:.1e}",
                "relative": f"{stage.relative:.1e}",
                "cosine": f"{stage.cosine:.6f}",
            }
            for stage in report.stages
        ]
        lines += [f"  {line}" for line in table(rows)]
    if report.not_run is not None:
        lines.append(f"  not run: {report.not_run}")
    if report.accuracy is not None:
        a, objects = report.accuracy, isinstance(report.parity, ObjectParity)
        same = "AP50 with the float model's sure objects for truth" if objects else "same first label for"
        lines.append(
            f"  on {a.images} images: {a.metric} {a.float_value:.2f} % in float, {a.int8_value:.2f} % in int8, "
            f"{lost(a.drop)}; {same} {a.agreement:.2f} %"
        )
        shown = ", ".join(report.float_layers[:8])
        more = len(report.float_layers) - 8
        lines.append(f"  layers in float: {shown or 'none'}{f' and {more} more' if more > 0 else ''}")
    return [*lines, *(f"  note: {note}" for note in report.notes), f"next: {_next_step(report)}"]


def _next_step(report: ExportReport) -> str:
    if report.format == "tensorrt":
        return (
            f"{report.path}.sh, on the machine with TensorRT"
            if report.not_run
            else f"trtexec --loadEngine={report.path}"
        )
    if report.not_run is not None:
        return f"take {report.path} to where it runs ({report.not_run})"
    return f"nextvit benchmark {report.path}"


def _parity_lines(head: str, p: Parity) -> list[str]:
    rows = [
        {
            "input": f"{row.batch} x {row.height} x {row.width}",
            "images": row.images,
            "largest difference": f"{row.max_abs:.1e}",
            "mean": f"{row.mean_abs:.1e}",
            "cosine, centred": f"{row.cosine:.6f}",
            "same first": f"{row.top1_agreement:.1f} %",
            "in first 5": f"{row.top5_agreement:.1f} %",
        }
        for row in p.rows
    ]
    lines = [
        f"{head}, run by {p.setup.runtime} on {p.setup.device} in {p.setup.precision}, beside the model in fp32 on "
        "images that ship here:",
        *(f"  {line}" for line in table(rows)),
        f"  logits up to {p.size:.3g}, spread over the images {p.spread:.3g}; largest difference relative to both: "
        f"{p.relative:.1e}, {p.to_spread:.1e}"
        + (f" (bounds {p.bound.relative:.0e}, {p.bound.to_spread:.0e})" if p.bound else ""),
    ]
    if not p.live:
        lines.append("  note: the outputs hardly depend on the image (random weights?), so the agreement says little.")
    return lines


def _object_parity_lines(head: str, p: ObjectParity) -> list[str]:
    rows = [
        {
            "input": f"1 x {row.height} x {row.width}",
            "images": row.images,
            "objects of the model": row.detections,
            "of the file": row.found,
            "the same": row.matched,
            "corners, pixels": f"{row.max_box:.1e}",
            "scores": f"{row.max_score:.1e}",
            "masks": f"{row.max_mask:.1e}",
        }
        for row in p.rows
    ]
    b = p.bound
    held = f"; the same: overlap above {b.overlap:g}, scores within {b.score:g}; needed {b.agreement:g} %" if b else ""
    lines = [
        f"{head}, run by {p.setup.runtime} on {p.setup.device} in {p.setup.precision}, beside the model in fp32 on "
        "images that ship here:",
        *(f"  {line}" for line in table(rows)),
        f"  {p.agreement:.2f} % of the objects are the same{held}",
    ]
    if not p.live:
        few = f"there are {p.detections} objects on them" if p.detections < FEWEST else "all scores are about the same"
        lines.append(f"  note: {few}, so that says little, and nothing was asked of it.")
    return lines


def lost(points: float) -> str:
    """What int8 costs, in words."""
    return f"{points:.2f} points lost" if points >= 0 else f"{-points:.2f} points gained"


def check_lines(found: Checked) -> list[str]:
    """What was found in a data set, for a terminal."""
    lines = table(_split_rows(found))
    if not found.findings:
        return [*lines, "nothing to mend."]
    for finding in found.findings:
        lines.append(f"{'error' if finding.serious else 'note'}: {finding.count} {finding.what}")
        lines += [f"  {example}" for example in finding.examples[:SHOWN]]
        if finding.count > SHOWN:
            lines.append(
                f"  ... and {finding.count - SHOWN} more; --output FILE.html lists {min(LISTED, finding.count)}"
            )
    return lines


def _split_rows(found: Checked) -> list[dict[str, object]]:
    return [
        {
            "split": name,
            "images": found.images[name],
            "classes": sum(count > 0 for count in by.values()),
            "smallest class": min(by.values()),
            "largest class": max(by.values()),
            "short side": "{} to {} pixels, median {}".format(*(found.sides[name][i] for i in (0, 2, 1)))
            if name in found.sides
            else "-",
        }
        for name, by in found.splits.items()
    ]


def write_check(found: Checked, data: str, page: Path) -> None:
    """The same as a page, with the images of each class."""
    parts = [html_table(_split_rows(found)), heading("Found")]
    for finding in found.findings:
        parts.append(paragraph(f"{'Error' if finding.serious else 'Note'}: {finding.count} {finding.what}"))
        parts.append(preformatted("\n".join(finding.examples)))
    if not found.findings:
        parts.append(paragraph("Nothing to mend."))
    classes = sorted({label for by in found.splits.values() for label in by})
    rows = [{"class": printable(label), **{n: by.get(label, 0) for n, by in found.splits.items()}} for label in classes]
    write_html(page, f"The images of {data}", [*parts, heading("Images of each class"), html_table(rows)])


# ---- HTML ------------------------------------------------------------------------------------------------------------

SHORT = 40  # characters of a cell that stay on one line
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #dde2e8; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e6eaef; } th { color: #596473; }
.scroll { overflow-x: auto; width: max-content; max-width: 96vw; min-width: 100%; }
.scroll { position: relative; left: 50%; transform: translateX(-50%); } .short { white-space: nowrap; }
.big { font-size: 2.2rem; font-weight: 600; color: #1f5fa8; } .note { color: #596473; }
pre { background: #f3f5f8; padding: .8rem; overflow-x: auto; }
"""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{html.escape(kind)}">{html.escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def picture(path: Path, alt: str) -> str:
    """A PNG inside the page, so that the page stands alone."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def html_table(rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: object) -> str:
    text = str(value)
    return f"<td{' class=short' if len(text) <= SHORT else ''}>{html.escape(text)}</td>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def write_html(path: Path, title: str, parts: Sequence[str]) -> None:
    """A page that needs nothing but itself."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )
    write_text(path, page)
