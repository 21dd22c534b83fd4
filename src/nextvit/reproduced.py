"""What `nextvit reproduce` leaves: tables beside the printed ones, the claims, a page."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nextvit import __version__, report
from nextvit.accuracies import (
    AS_PRINTED,
    Kind,
    Score,
    Study,
    evaluate_networks,
    kinds_of,
    mean_of,
    of_row,
    read_scores,
    summed_up,
    train_networks,
)
from nextvit.benchmark import CONFIDENCE
from nextvit.devices import cpu_count
from nextvit.equal_latency import TOLERANCE, Depth, at_depths, of_equal_latency
from nextvit.files import write_rows, write_text
from nextvit.foreign import note_of
from nextvit.paper import ABLATION_TABLES, ACCURACY, CLAIMS, EXPLAINED, PRINTED, SIZES, TABLES, PaperRow, paper_rows
from nextvit.progress import track
from nextvit.reproduce import (
    Count,
    Held,
    Latency,
    RuntimeSetup,
    counts,
    held,
    insist_on_machine,
    machine,
    measure,
    pareto_front,
    rank_correlation,
    read_latencies,
    read_records,
    setup_name,
    today,
)
from nextvit.tradeoff import trade_off

TITLES = {
    "table4": "Table 4: classification on ImageNet-1K",
    "table5": "Table 5: segmentation of ADE20K; latency is the backbone's at 512 x 512",
    "table6": "Table 6: detection on COCO; latency is the backbone's at 512 x 512",
    "table1": "Table 1: which blocks a stage has (C: NCB, T: NTB, H_N: NCBs and an NTB behind them)",
    "table2": "Table 2: N and L in stage 3; its figures are lost, its rows are what its text says",
    "table7": "Table 7: blocks in NCB's place",
    "table8": "Table 8: r, the share of E-MHSA in an NTB",
    "table9": "Table 9: norm and activation; its figures are lost",
}
LEGEND = (
    "Printed latencies are the paper's: TensorRT's on a T4 GPU for eight images at once, CoreML's on an iPhone 12 Pro "
    "Max for one. Those measured here are of the batch, one image unless the column says another; behind them is the "
    f"ratio to Next-ViT-S's, which was measured beside every network, with a {100 * CONFIDENCE:.0f} % interval of its "
    "median. Who is marked with a star is on the front, by medians: of the rows that were measured, reconstructions "
    "left out, none is both faster and better by the first accuracy that is printed."
)
PROXY_NOTE = (
    "A proxy: the network was trained for a minute or two on the images that ship with the package, alike for all "
    "rows; mean and standard deviation over the seeds. It tells what is learnt fast, not what a training on ImageNet "
    "comes to."
)
DEPTHS_NOTE = (
    "third: blocks in stage 3; more: added to the usual ones of stage 2; ratio: latency / the reference's, and within "
    f"{100 * TOLERANCE:.0f} % the two are taken for one; tried: networks that were measured."
)
CLAIMS_NOTE = (
    "The text's own figures often differ from its tables, and by times faster it mostly means the ratio less 1: twice "
    "as long is 1x faster."
)
FIGURE5_NOTE = (
    "By `nextvit explain`. These networks were trained for minutes on the garments that ship with the package, at 96 "
    "pixels; the paper's are of ImageNet."
)
HEADINGS = {  # of what is told of a table
    "orders": "Is the order the paper's?",
    "claims": "Claims of the text",
    "depths": "Depths that come nearest to the reference's latency",
    "costs": "Parameters (millions) and operations (10^9 multiply-adds)",
}
PLACE = ("machine", "threads")  # columns of where a record was measured
FEWEST_RANKED = 5  # rows that an order is told of
EQUAL = ("table1", "table2", "table7")  # whose networks are brought to one latency


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


def latency_rows(
    rows: Sequence[PaperRow], found: Sequence[Latency], scores: Sequence[Score] = ()
) -> list[dict[str, object]]:
    """A line a network: printed latencies and accuracies, and what was measured: accuracies, latencies by runtime."""
    by_row = {(one.row, *one.setup): one for one in found}
    setups = list(dict.fromkeys(one.setup for one in found))
    at_one_latency = rows[0].table in EQUAL  # nobody is faster there but by chance
    fronts = {setup: set() if at_one_latency else _front(rows, by_row, setup) for setup in setups}
    kinds = kinds_of(rows, scores)
    lines = []
    for row in rows:
        note = note_of(row.network)
        line: dict[str, object] = {"network": row.name + f" ({note})" * bool(note), "pixels": row.image_size}
        line |= {name: row.printed.get(column, "-") for column, name in ACCURACY[row.table].items()}
        line |= {title: summed_up(of_row(row, scores, kind)) for kind, title in kinds.items()}
        line |= {name: row.printed.get(column, "-") for column, name in PRINTED.items()}
        for setup in setups:
            one = by_row.get((row.key, *setup))
            star = " *" if row.key in fronts[setup] else ""
            line[setup_name(setup)] = "-" if one is None else one.told + star
        lines.append(line)
    return lines


def order_rows(rows: Sequence[PaperRow], found: Sequence[Latency], scores: Sequence[Score]) -> list[dict[str, object]]:
    """Spearman's rho between what is printed and what was measured here: latencies by runtime, mean accuracies."""
    known = {row.key: row for row in rows if not note_of(row.network)}
    lines = []
    if rows[0].table not in EQUAL:
        for setup in dict.fromkeys(one.setup for one in found):
            here = {one.row: one.ratio for one in found if one.setup == setup and one.ratio is not None}
            lines += [_order(setup_name(setup), name, column, known, here) for column, name in PRINTED.items()]
    for kind, title in kinds_of(rows, scores).items():
        means = {key: mean_of(of_row(row, scores, kind)) for key, row in known.items()}
        here = {key: mean for key, mean in means.items() if mean is not None}
        columns = {column: name for column, name in ACCURACY[rows[0].table].items() if column in AS_PRINTED[kind[:2]]}
        lines += [_order(title, name, column, known, here) for column, name in columns.items()]
    return [line for line in lines if line]


def _order(
    here_name: str, name: str, column: str, known: Mapping[str, PaperRow], here: Mapping[str, float]
) -> dict[str, object]:
    """A line, of rows that have both; nothing where they are too few to tell, or all alike."""
    pairs = [(row.printed[column], here[key]) for key, row in known.items() if column in row.printed and key in here]
    if len(pairs) < FEWEST_RANKED or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return {}
    rho = rank_correlation(*zip(*pairs, strict=True))
    return {"here": here_name, "printed": name, "Spearman's rho": f"{rho:.2f}", "rows": len(pairs)}


def claim_rows(verdicts: Sequence[Held]) -> list[dict[str, object]]:
    return [
        {
            "claim": f"{one.claim.faster} takes {'about as long as' if one.claim.similar else 'less time than'} "
            f"{one.claim.slower}",
            "in the text": one.claim.text or "-",
            "runtime": setup_name(one.setup),
            "the other's time / its own, printed (TensorRT)": f"{one.printed:.2f}",
            "here": f"{one.measured:.2f} ({one.low:.2f} to {one.high:.2f})",
            "verdict": one.verdict,
        }
        for one in verdicts
    ]


@dataclass(frozen=True)
class Rerun:
    """What is known of a table: its rows, the depths of ablations, and what was counted, measured and trained."""

    table: str
    rows: Sequence[PaperRow]
    counted: Sequence[Sequence[Count]]
    found: Sequence[Latency]
    scores: Sequence[Score]
    depths: Sequence[Depth]
    page: Path

    def lines(self) -> list[dict[str, object]]:
        """For a terminal: what was measured, or where there is nothing costs."""
        return measured_rows(self) or count_rows(self.rows, self.counted)


def measured_rows(one: Rerun) -> list[dict[str, object]]:
    """Latencies and accuracies, a line a network; none where nothing was measured."""
    return latency_rows(one.rows, one.found, one.scores) if one.found or kinds_of(one.rows, one.scores) else []


def rerun(
    table: str,
    rows: Sequence[PaperRow],
    folder: Path,
    *,
    setups: Sequence[tuple[str, str]],
    batches: Sequence[int],
    threads: int | None,
    rounds: int,
    costs_alone: bool,
    study: Study | None = None,
    evaluated: tuple[str, Path | None] | None = None,
) -> Rerun:
    """Count, measure and train rows of a table, and write its files into a folder; what that has is not done again.

    Ablations are brought to one latency first, on the last runtime in its first precision. costs_alone: no latency is
    searched or measured. study: what the networks are trained on; None: they are not. evaluated: the images, and the
    folder of weights, that they are evaluated with. What comes back has these rows, and all others of the table that
    the folder has something of.
    """
    if not costs_alone:
        _insist_on_one_machine(folder, threads or cpu_count())
    shown: Sequence[PaperRow] = paper_rows(table)
    depths: list[Depth] = []
    if table in ABLATION_TABLES:
        file = folder / f"{table}-depths.csv"
        setup = next(setup for setup in setups if setup[0] == setups[-1][0])
        if not costs_alone:
            of_equal_latency(rows, file, setup, threads=threads, rounds=rounds)
        known = sorted(read_records(file, Depth), key=lambda one: (one.runtime, one.precision) == setup)
        rows, _ = at_depths(rows, known)
        shown, depths = at_depths(shown, known)
    place = folder / f"measured-{table if table in ABLATION_TABLES else SIZES[table]}.csv"  # 5 and 6 share theirs
    if not costs_alone:
        measure(rows, place, setups=setups, batches=batches, threads=threads, rounds=rounds)
    if study is not None:
        train_networks(rows, study, folder, threads)
    if evaluated is not None:
        evaluate_networks(rows, *evaluated, folder, threads)
    found, scores = read_latencies(place), read_scores(folder)
    there = {row.key for row in rows} | {one.row for one in found} | _counted(table, folder)
    shown = [row for row in shown if row.key in there or kinds_of([row], scores)]
    found = [one for one in found if one.row in {row.key for row in shown}]
    counted = [counts(row) for row in track(shown, total=len(shown), label=f"count {table}")]
    one = Rerun(table, shown, counted, found, scores, depths, folder / f"{table}.html")
    write_reproduction(one, folder)
    return one


def _insist_on_one_machine(folder: Path, threads: int) -> None:
    """That what is measured now can stand beside all that a folder has."""
    for pattern, kind in (("measured-*.csv", Latency), ("*-depths.csv", Depth)):
        for file in sorted(folder.glob(pattern)):
            known: Sequence[Latency | Depth] = read_records(file, kind)
            insist_on_machine(file, [(one.machine, one.threads) for one in known], threads)


def _counted(table: str, folder: Path) -> set[str]:
    """Keys of the rows whose costs a folder has."""
    file = folder / f"{table}-costs.csv"
    return {f"{row['network']} {row['pixels'] or SIZES[table]}" for row in (_records(file) if file.exists() else [])}


def write_reproduction(one: Rerun, folder: Path) -> None:
    """All files of a table in a folder, its page among them."""
    table, rows, found = one.table, one.rows, one.found
    costs, claims = count_rows(rows, one.counted), claim_rows(held(CLAIMS, rows, found))
    flagged = [line for line in costs if line["flag"] or line["counted"] == "-"]
    write_rows(folder / f"{table}-costs.csv", costs)
    where = _where(found) if found else f"{machine()}; {today()}"
    kinds = kinds_of(rows, one.scores)
    parts = [
        report.paragraph(
            f"{len(rows)} of {len(paper_rows(table))} rows; {where}. "
            f"Accuracies are the paper's{', but for those of columns that say otherwise' * bool(kinds)}."
        ),
        *[report.paragraph(LEGEND)] * bool(found),
    ]
    if lines := measured_rows(one):
        write_rows(folder / f"{table}-latency.csv", lines)
        if table in TABLES and found:
            picture = folder / f"{table}-tradeoff.png"
            trade_off(rows, found, one.scores, picture)
            parts += [report.picture(picture, "accuracy against latency")] if picture.exists() else []
        parts.append(report.html_table(lines))
    stale = [] if lines else ["latency.csv"]  # of measurements that are gone
    stale += [] if found else ["tradeoff.png", "tradeoff.svg", "tradeoff.html"]
    for name in stale:
        (folder / f"{table}-{name}").unlink(missing_ok=True)
    if note := _proxy_note(kinds):
        parts.append(report.paragraph(note, "note"))
    if one.depths:
        parts += [report.heading(HEADINGS["depths"]), report.paragraph(DEPTHS_NOTE, "note")]
        heading = f"within {100 * TOLERANCE:.0f} %"
        within = [{**asdict(depth), heading: "yes" if depth.ok else "no"} for depth in one.depths]
        parts.append(report.html_table(within))
    orders = order_rows(rows, found, one.scores)
    for what, some in (("orders", orders), ("claims", claims)):
        if some:
            write_rows(folder / f"{table}-{what}.csv", some)
        else:
            (folder / f"{table}-{what}.csv").unlink(missing_ok=True)
    if orders:
        parts += [report.heading(HEADINGS["orders"]), report.html_table(orders)]
    if claims:
        parts += [report.heading(HEADINGS["claims"]), report.paragraph(CLAIMS_NOTE, "note"), report.html_table(claims)]
    parts += [
        report.heading(HEADINGS["costs"]),
        report.paragraph(f"{len(flagged)} of {len(costs)} figures differ by more than 2 %, or cannot be counted."),
        report.html_table(costs),
        report.paragraph(f"nextvit {__version__}", "note"),
    ]
    report.write_html(one.page, TITLES[table], parts)


def _proxy_note(kinds: Iterable[Kind]) -> str:
    """What proxies are, and what these were trained on; nothing where there are none."""
    proxies = [kind for kind in kinds if kind.proxy]
    places = sorted({kind.on for kind in proxies if kind.on})
    return PROXY_NOTE + f" Trained on {' and on '.join(places)}." * bool(places) if proxies else ""


def _front(rows: Sequence[PaperRow], by_row: dict[tuple[str, str, str, int], Latency], setup: RuntimeSetup) -> set[str]:
    """Keys of the rows that no other one beats, by the table's first accuracy; none where there is nothing to beat."""
    column = next(iter(ACCURACY[rows[0].table]))
    good = [row for row in rows if column in row.printed and not note_of(row.network)]
    there = [(row, by_row.get((row.key, *setup))) for row in good]
    pairs = [(row, one.ratio) for row, one in there if one is not None and one.ratio is not None]
    if len(pairs) < 2:
        return set()
    front = pareto_front([(ratio, row.printed[column]) for row, ratio in pairs])
    return {row.key for (row, _), best in zip(pairs, front, strict=True) if best}


def write_readme(folder: Path) -> None:
    """README.md of all that the folder has, as repositories show it: pictures and tables, with links to the rest and
    to folders in it, which are of other machines.
    """
    parts = [
        "# The paper, rerun",
        f"By `nextvit reproduce`, nextvit {__version__}, {today()}.",
    ]
    measured_here = [one for file in sorted(folder.glob("measured-*.csv")) for one in read_latencies(file)]
    parts += [f"{_where(measured_here)}."] if measured_here else []
    if others := [
        f"[{other.parent.name}]({other.parent.name}/README.md)" for other in sorted(folder.glob("*/README.md"))
    ]:
        parts.append(f"Other machines: {', '.join(others)}.")
    parts += [LEGEND] * bool(measured_here)
    if (folder / "figure1.png").exists():
        parts.append("## Figure 1\n\n![accuracy against latency](figure1.png)")
    for table in sorted(TITLES):
        parts += _told_of_table(table, folder)
    if (folder / "figure5" / "spectra.png").exists():
        parts.append(f"## Figure 5: frequencies of the maps\n\n![spectra](figure5/spectra.png)\n\n{FIGURE5_NOTE}")
    if (folder / "fit.csv").exists():
        parts += _told_of_fit(_records(folder / "fit.csv"))
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _told_of_table(table: str, folder: Path) -> list[str]:
    """Paragraphs, by the files of the table; none where there are none."""
    files = {what: folder / f"{table}-{what}.csv" for what in ("latency", "orders", "claims", "depths", "costs")}
    there = {what: _records(file) for what, file in files.items() if file.exists()}
    if not there:
        return []
    parts = [f"## {TITLES[table]}"]
    networks = [one["network"] + one.get("pixels", "") for one in there.get("latency") or there.get("costs") or []]
    told = f"{len(set(networks))} of {len(paper_rows(table))} rows"
    if on := _how_many(there.get("latency", [])):
        told += "; latencies on " + ", ".join(f"{name} of {count}" for name, count in on.items())
    parts += [f"{told}."] * bool(networks)
    if (folder / f"{table}-tradeoff.png").exists():
        parts.append(f"![accuracy against latency]({table}-tradeoff.png)")
    if measured := there.get("latency"):
        parts.append(_markdown(measured))
        if any("a proxy" in column for column in measured[0]):
            own = {row.network.partition("@")[0] for row in paper_rows(table)}
            known = [score for score in read_scores(folder) if score.percent is not None]
            parts.append(_proxy_note(one.kind for one in known if one.network.partition("@")[0] in own))
    for what in ("orders", "claims"):
        if there.get(what):
            parts += [f"### {HEADINGS[what]}", *[CLAIMS_NOTE] * (what == "claims"), _markdown(there[what])]
    if there.get("depths"):
        parts += [f"### {HEADINGS['depths']}", DEPTHS_NOTE, _markdown(there["depths"], hidden=PLACE)]
    if costs := there.get("costs"):
        printed = [one for one in costs if one["printed"] != "-"]
        odd = [one for one in printed if one["flag"] or one["why"]]
        parts.append(f"### {HEADINGS['costs']}")
        told = f"[Those of all these rows]({files['costs'].name})"
        if printed:
            told += f"; {len(printed) - len(odd)} of {len(printed)} printed figures are within 2 % of the network's"
        parts.append(told + (", and the others are" if odd else "."))
        parts += [_markdown(odd, hidden=("flag",))] if odd else []
    return parts


def _told_of_fit(records: Sequence[Mapping[str, str]]) -> list[str]:
    """Paragraphs of what benchmarks/fit.py left, on the machine that it ran on last."""
    machine, threads = (records[-1][what] for what in PLACE)
    told = "speed is how long a network that blocks were measured from takes now / then, and error allows for it"
    return [
        "## fit: latency as predicted and as measured, of configurations drawn at random",
        f"{machine}; {threads} threads; {told}.",
        _markdown([one for one in records if (one["machine"], one["threads"]) == (machine, threads)], hidden=PLACE),
    ]


def _where(found: Sequence[Latency]) -> str:
    """On what machine, with how many threads, and when; not when, where there is a latency whose day is not known."""
    days = sorted({one.day for one in found if one.ratio is not None})
    when = f"; measured {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days and days[0] else ""
    return f"{found[0].machine}; {found[0].threads} threads{when}"


def _how_many(lines: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Of each runtime, precision and batch the rows of a table that were measured; these columns are the last ones."""
    columns = list(lines[0]) if lines else []
    setups = columns[columns.index(list(PRINTED.values())[-1]) + 1 :] if columns else []
    return {setup: sum(" ms, " in line[setup] for line in lines) for setup in setups}


def _records(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _markdown(records: Sequence[Mapping[str, str]], *, hidden: Sequence[str] = ()) -> str:
    head = [column for column in records[0] if column not in hidden]
    lines = [head, ["---"] * len(head), *([one[key].replace("|", "\\|") for key in head] for one in records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(one: Rerun) -> dict[str, object]:
    """For --json."""
    costs = [
        {"row": row.key, **asdict(cost), "differs": cost.differs}
        for row, some in zip(one.rows, one.counted, strict=True)
        for cost in some
    ]
    networks = {row.network for row in one.rows}
    scores = [asdict(score) for score in one.scores if score.network in networks]
    return {"costs": costs, "latencies": [asdict(latency) for latency in one.found], "accuracies": scores}
