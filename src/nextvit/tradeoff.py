"""Figure 1 here: accuracy against latency, printed and measured, of a table or of all three tasks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nextvit import plots
from nextvit.accuracies import Score, kinds_of, mean_of, of_row
from nextvit.errors import UserError
from nextvit.foreign import note_of
from nextvit.paper import ACCURACY, ANCHOR, PRINTED, SIZES, PaperRow, paper_rows
from nextvit.reproduce import DENSE, Latency, RuntimeSetup, setup_name

ACROSS = 4  # panels, of a table with one accuracy
OURS = "Next-ViT"
FAMILY = re.compile(r"Next-ViT|TRT-ViT|Twins-SVT|[A-Za-z]+(?:(?<=v)2)?")  # what a network's name begins with
Table = tuple[Sequence[PaperRow], Sequence[Latency]]  # rows, and what was measured of them


def trade_off(rows: Sequence[PaperRow], found: Sequence[Latency], scores: Sequence[Score], path: Path) -> None:
    """A table's part of Figure 1 on this machine: a panel a setup and an accuracy, printed or measured here."""
    accuracies = {**_printed(rows), **_scored(rows, scores)}
    panels = [
        panel
        for row, told in enumerate(accuracies)
        for panel in _panels(rows, found, told, accuracies[told], _measured_setups(found), row)
    ]
    if len(accuracies) == 1:  # there is room below
        panels = [replace(panel, row=n // ACROSS, column=n % ACROSS) for n, panel in enumerate(panels)]
    if panels:
        plots.trade_off(panels, OURS, _label(ANCHOR), path)


def figure1(tables: Sequence[Table], path: Path) -> None:
    """Figure 1 on this machine: a row a task, by its first accuracy, a column a setup, the printed ones first."""
    setups = list(dict.fromkeys(setup for _, found in tables for setup in _measured_setups(found)))
    panels = []
    for number, (rows, found) in enumerate(tables):
        told, accuracy = next(iter(_printed(rows).items()))
        panels += _panels(rows, found, told, accuracy, setups, number)
    if not panels:
        raise UserError("none of these rows has a latency, printed or measured, so there is nothing to draw.")
    plots.trade_off(panels, OURS, _label(ANCHOR), path)


def _measured_setups(found: Sequence[Latency]) -> list[RuntimeSetup]:
    return list(dict.fromkeys(one.setup for one in found if one.ratio is not None))


def _printed(rows: Sequence[PaperRow]) -> dict[str, dict[str, float]]:
    """The paper's accuracies by their names, each by the keys of the rows."""
    columns = ACCURACY[rows[0].table].items()
    return {name: {row.key: row.printed[column] for row in rows if column in row.printed} for column, name in columns}


def _scored(rows: Sequence[PaperRow], scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Likewise those measured here in the table's own task, but for proxies, which are of another trade-off."""
    own = DENSE[rows[0].table][0][1] if rows[0].table in DENSE else "classify"
    real = [score for score in scores if score.task == own and not score.kind.proxy and score.percent is not None]
    found = {}
    for kind, title in kinds_of(rows, real).items():
        means = {row.key: mean_of(of_row(row, real, kind)) for row in rows}
        found[title] = {key: mean for key, mean in means.items() if mean is not None}
    return found


def _panels(
    rows: Sequence[PaperRow],
    found: Sequence[Latency],
    told: str,
    accuracy: Mapping[str, float],
    setups: Sequence[RuntimeSetup],
    place: int,
) -> list[plots.Panel]:
    """The printed latencies and then the measured ones, all relative to the anchor's at the table's usual size.

    told, accuracy: what rows are good by, and how good, by their keys.
    """
    by_row = {(one.row, *one.setup): one for one in found}
    anchor = next(row for row in paper_rows(rows[0].table) if row.network == ANCHOR).printed
    good = [row for row in rows if row.key in accuracy]

    def point(row: PaperRow, ratio: float, latency: str, *, measured: bool) -> plots.Point:
        size = f"{row.name} at {row.image_size} pixels"
        text = f"{size}<br>{accuracy[row.key]:.3g} {told}<br>{latency}"
        return plots.Point(*_label_and_family(row, measured=measured), ratio, accuracy[row.key], text)

    panels = []
    for number, (latency, name) in enumerate(PRINTED.items()):
        points = [
            point(row, row.printed[latency] / anchor[latency], f"{row.printed[latency]:g} ms", measured=False)
            for row in good
            if latency in row.printed
        ]
        panels.append(plots.Panel(place, number, name.replace(", ms", ""), told, tuple(points)))
    for number, setup in enumerate(setups, len(PRINTED)):
        there = [(row, by_row.get((row.key, *setup))) for row in good]
        points = [point(row, one.ratio, one.told, measured=True) for row, one in there if one and one.ratio]
        panels.append(plots.Panel(place, number, setup_name(setup), told, tuple(points)))
    return [panel for panel in panels if panel.points]


def _label_and_family(row: PaperRow, *, measured: bool) -> tuple[str, str]:
    """In a picture. measured: a latency of here is shown, so it is to be said what the network is."""
    usual = row.image_size == SIZES[row.table]
    label = row.name if usual else f"{row.name} {row.image_size}"
    found = FAMILY.match(row.name)
    assert found is not None
    family = f"{OURS} {row.image_size}" if found[0] == OURS and not usual else found[0]
    if measured and (note := note_of(row.network)):
        family, label = f"{family} (reconstruction)", f"{label}, {note}"
    return label, family


def _label(network: str) -> str:
    return next(row.name for row in paper_rows("table4") if row.network == network)
