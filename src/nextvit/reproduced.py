"""What `nextvit reproduce` leaves: tables beside the printed ones, the claims, a trade-off plot, a page."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nextvit import __version__, plots, report
from nextvit.extras import version
from nextvit.files import write_rows
from nextvit.paper import ACCURACY, ANCHOR, CLAIMS, EXPLAINED, PaperRow
from nextvit.reproduce import Count, Held, Latency, held, pareto_front, rank_correlation

TITLES = {
    "table4": "Table 4: classification on ImageNet-1K",
    "table5": "Table 5: segmentation of ADE20K; latency is the backbone's at 512 x 512",
    "table6": "Table 6: detection on COCO; latency is the backbone's at 512 x 512",
}
PRINTED = {"tensorrt_ms": "TensorRT, ms (printed)", "coreml_ms": "CoreML, ms (printed)"}
FEWEST_RANKED = 5  # rows that an order is told of
Setup = tuple[str, str, int]


def count_rows(rows: Sequence[PaperRow], counted: Sequence[Sequence[Count]]) -> list[dict[str, object]]:
    """A line for each cost: printed, counted, and why they differ."""
    return [
        {
            "network": row.name,
            "pixels": row.image_size if row.table == "table4" else "",
            "built as": row.network,
            "cost": one.column,
            "printed": "-" if one.printed is None else f"{one.printed:g}",
            "counted": "-" if one.counted is None else f"{one.counted:.2f}",
            "difference": f"{one.counted / one.printed - 1:+.1%}" if one.printed and one.counted else "",
            "flag": "differs" if one.differs else "",
            "why": _why(row, one),
        }
        for row, costs in zip(rows, counted, strict=True)
        for one in costs
    ]


def _why(row: PaperRow, one: Count) -> str:
    if one.has_attention:
        return f"printed with attention products; with them it is {one.with_attention:g}"
    return one.why or (EXPLAINED.get((row.table, row.key, one.column), "") if one.differs else "")


def latency_rows(rows: Sequence[PaperRow], found: Sequence[Latency]) -> list[dict[str, object]]:
    """A line a network: printed latencies and accuracies, and what was measured on each runtime."""
    by_row = {(one.row, *one.setup): one for one in found}
    setups = list(dict.fromkeys(one.setup for one in found))
    fronts = {setup: _front(rows, by_row, setup) for setup in setups}
    lines = []
    for row in rows:
        line: dict[str, object] = {"network": row.name, "pixels": row.image_size}
        line |= {told: row.printed.get(column, "-") for column, told in ACCURACY[row.table].items()}
        line |= {told: row.printed.get(column, "-") for column, told in PRINTED.items()}
        for setup in setups:
            one = by_row.get((row.key, *setup))
            star = " *" if row.key in fronts[setup] else ""
            line[_named(setup)] = "-" if one is None else _told(one) + star
        lines.append(line)
    return lines


def correlation_rows(rows: Sequence[PaperRow], found: Sequence[Latency]) -> list[dict[str, object]]:
    """Spearman's rho between the printed latencies and those measured here, by runtime."""
    lines = []
    for setup in dict.fromkeys(one.setup for one in found):
        here = {one.row: one.ratio for one in found if one.setup == setup and one.ratio is not None}
        line: dict[str, object] = {"runtime": _named(setup)}
        for column, told in PRINTED.items():
            pairs = [(row.printed[column], here[row.key]) for row in rows if column in row.printed and row.key in here]
            enough = len(pairs) >= FEWEST_RANKED
            line[told] = f"{rank_correlation(*zip(*pairs, strict=True)):.2f} ({len(pairs)} rows)" if enough else "-"
        lines.append(line)
    return lines


def claim_rows(verdicts: Sequence[Held]) -> list[dict[str, object]]:
    return [
        {
            "claim": f"{one.claim.faster} takes less time than {one.claim.slower}",
            "runtime": f"{one.runtime} {one.precision}",
            "times faster, printed (TensorRT)": f"{one.printed:.2f}",
            "here": f"{one.measured:.2f} ({one.low:.2f} to {one.high:.2f})",
            "verdict": one.verdict,
        }
        for one in verdicts
    ]


def write_reproduction(
    table: str, rows: Sequence[PaperRow], counted: Sequence[Sequence[Count]], found: Sequence[Latency], folder: Path
) -> Path:
    """All files of a table in a folder; returns its page."""
    costs, claims = count_rows(rows, counted), claim_rows(held(CLAIMS, rows, found))
    flagged = [line for line in costs if line["flag"] or line["counted"] == "-"]
    write_rows(folder / f"{table}-costs.csv", costs)
    parts = [
        report.paragraph(
            f"{len(rows)} rows. Measured on {platform.processor() or platform.machine()}, {machine()}, "
            f"{datetime.date.today().isoformat()}; accuracies are the paper's. {ANCHOR} was measured beside every "
            "network, and the ratio is to it, with a 99 % interval of its median; * no row here is both faster and "
            "better."
        )
    ]
    if found:
        lines = latency_rows(rows, found)
        write_rows(folder / f"{table}-latency.csv", lines)
        picture = folder / f"{table}.png"
        trade_off(table, rows, found, picture)
        parts += [report.picture(picture, "accuracy against latency"), report.html_table(lines)]
        parts += [report.heading("Is the order the paper's?"), report.html_table(correlation_rows(rows, found))]
        if claims:
            write_rows(folder / f"{table}-claims.csv", claims)
            parts += [report.heading("Claims of the text"), report.html_table(claims)]
    parts += [
        report.heading("Parameters (millions) and operations (10^9 multiply-adds)"),
        report.paragraph(f"{len(flagged)} of {len(costs)} figures differ by more than 2 %, or cannot be counted."),
        report.html_table(costs),
        report.paragraph(f"nextvit {__version__}", "note"),
    ]
    page = folder / f"{table}.html"
    report.write_html(page, TITLES[table], parts)
    return page


def trade_off(table: str, rows: Sequence[PaperRow], found: Sequence[Latency], path: Path) -> None:
    """Figure 1 on this machine: accuracy against milliseconds, a panel a runtime and a kind of accuracy."""
    by_row = {(one.row, *one.setup): one for one in found if one.ms is not None}
    setups = [setup for setup in dict.fromkeys(one.setup for one in found) if setup[2] == 1]
    panels = []
    for column, told in ACCURACY[table].items():
        for setup in setups:
            there = [(row, by_row.get((row.key, *setup))) for row in rows if column in row.printed]
            points = [(row.name, one.ms, row.printed[column]) for row, one in there if one is not None and one.ms]
            if points:
                panels.append((_named(setup), told, points))
    plots.trade_off(panels, path)


def machine() -> str:
    """Versions of what was measured with."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino", "timm"))


def _front(rows: Sequence[PaperRow], by_row: dict[tuple[str, str, str, int], Latency], setup: Setup) -> set[str]:
    """Keys of the rows that no other one beats, by the table's first accuracy."""
    column = next(iter(ACCURACY[rows[0].table]))
    there = [(row, by_row.get((row.key, *setup))) for row in rows if column in row.printed]
    pairs = [(row, one.ratio) for row, one in there if one is not None and one.ratio is not None]
    front = pareto_front([(ratio, row.printed[column]) for row, ratio in pairs])
    return {row.key for (row, _), best in zip(pairs, front, strict=True) if best}


def _told(one: Latency) -> str:
    if one.ratio is None:
        return f"not measured: {one.why}"
    low, ratio, high = one.interval
    return f"{one.ms:.1f} ms, {ratio:.2f} ({low:.2f} to {high:.2f})"


def _named(setup: Setup) -> str:
    runtime, precision, batch = setup
    return f"{runtime} {precision}" + f", batch {batch}" * (batch > 1)


def summary(
    rows: Sequence[PaperRow], counted: Sequence[Sequence[Count]], found: Sequence[Latency]
) -> dict[str, object]:
    """For --json."""
    costs = [
        {"row": row.key, **asdict(one), "differs": one.differs}
        for row, some in zip(rows, counted, strict=True)
        for one in some
    ]
    return {"costs": costs, "latencies": [asdict(one) for one in found]}
