"""Networks of one latency (paper, Tables 1, 2 and 7): depth is changed until one takes as long as its reference."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nextvit.ablations import ABLATIONS, MOST_BLOCKS, Ablation
from nextvit.benchmark import benchmark
from nextvit.create import create_model
from nextvit.devices import cpu_count
from nextvit.errors import DiskFull
from nextvit.files import write_rows
from nextvit.paper import SIZES, PaperRow, ablation_row
from nextvit.progress import say
from nextvit.reproduce import ROUNDS, Sessions, first_line, insist_on_machine, machine, read_records, today
from nextvit.runtime.session import Session

TOLERANCE = 0.03  # of the reference's latency
A_BLOCK = 0.04  # of the latency, what one is taken for before two depths were measured
MOST_MORE = 2  # blocks, by which stage 2 is made deeper or shallower
MOST_TRIES = 14  # networks that are measured
AGAIN = 3  # times the rounds, that one which seems near is measured again in


def near(ratio: float) -> bool:
    """Whether latencies of this ratio are taken for one."""
    return abs(ratio - 1) <= TOLERANCE


@dataclass(frozen=True)
class Equal:
    """The depths that were found, and what was measured of them."""

    third: int  # blocks in stage 3
    more: int  # in stage 2, more than the reference has
    ratio: float  # latency / the reference's
    tried: int  # networks that were measured

    @property
    def ok(self) -> bool:
        return near(self.ratio)


def equal_latency(
    ratio_of: Callable[[int, int], float], can_have: Callable[[int, int], bool], start: tuple[int, int]
) -> Equal:
    """Search the depths whose latency is nearest to the reference's; `ok` of what is returned says whether it is near.

    ratio_of: measures (blocks in stage 3, more in stage 2) -> latency / the reference's. It grows with both. can_have:
    whether there is such a network. start: what is asked first. Stage 3 is changed first, by the slope between the two
    nearest depths known; where whole blocks are too coarse, stage 2 too.
    """
    known: dict[tuple[int, int], float] = {}

    def ask(depths: tuple[int, int]) -> float:
        if depths not in known:
            known[depths] = ratio_of(*depths)
        return known[depths]

    def nearest() -> tuple[int, int]:
        return min(known, key=lambda depths: abs(known[depths] - 1))

    def done() -> bool:
        return near(known[nearest()]) or len(known) >= MOST_TRIES

    ask(start)
    if not done():
        ask((start[0], 0))
    while not done():
        at, slope = nearest()[0], _slope({n: ratio for (n, more), ratio in known.items() if not more})
        wanted = min(max(1, at + round((1 - known[at, 0]) / slope)), MOST_BLOCKS)
        if wanted == at:  # the nearest whole number is still too far: is its neighbour nearer?
            wanted = at + (1 if known[at, 0] < 1 else -1)
        if (wanted, 0) in known or not can_have(wanted, 0):
            break
        ask((wanted, 0))
    base = nearest()[0]
    slope = _slope({n: ratio for (n, more), ratio in known.items() if not more})
    if not done() and can_have(base, 1):
        step = max(ask((base, 1)) - known[base, 0], 1e-3)
        while not done():
            guesses = {
                (n, more): known[base, 0] + (n - base) * slope + more * step
                for more in range(-MOST_MORE, MOST_MORE + 1)
                for n in range(max(1, base - 3), base + 4)
                if can_have(n, more) and (n, more) not in known
            }
            guess = min(guesses, key=lambda depths: abs(guesses[depths] - 1), default=None)
            if guess is None or abs(guesses[guess] - 1) > 2 * TOLERANCE:
                break
            ask(guess)
    best = nearest()
    return Equal(*best, known[best], len(known))


def _slope(ratios: dict[int, float]) -> float:
    """Latency of a block, from the two depths that are nearest to the reference."""
    if len(ratios) < 2:
        return A_BLOCK
    (a, b) = sorted(sorted(ratios, key=lambda n: abs(ratios[n] - 1))[:2])
    return max((ratios[b] - ratios[a]) / (b - a), A_BLOCK / 10)


# ---- measured --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Depth:
    """The network of an ablation that takes as long as its reference here, as near as whole blocks come."""

    network: str  # a MODEL
    reference: str
    runtime: str
    precision: str
    machine: str
    threads: int
    third: int
    more: int
    ratio: float  # latency / the reference's, batch 1
    tried: int
    day: str = ""  # of the search, YYYY-MM-DD

    @property
    def ok(self) -> bool:
        return near(self.ratio)


def of_equal_latency(
    rows: Sequence[PaperRow],
    file: Path,
    setup: tuple[str, str],
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> tuple[list[PaperRow], list[Depth]]:
    """Rows of ablations with the depths that bring those that have a reference to its latency; and these depths.

    setup: runtime and precision. Each is kept in the CSV `file` when it is known: what is there is not searched again.
    """
    runtime, precision = setup
    threads = threads or cpu_count()
    done = read_records(file, Depth)
    insist_on_machine(file, [(one.machine, one.threads) for one in done], threads)
    with tempfile.TemporaryDirectory() as place:
        references: dict[str, Sessions] = {}
        for ablation in _ablations(rows):
            base, name, size = ablation.variant.name, ablation.reference, SIZES[ablation.table]
            there = {one.network.partition("@")[0] for one in done if (one.runtime, one.precision) == setup}
            if name is None or base in there:
                continue
            opened = partial(_opened, ablation, Path(place, "row"), runtime, precision, threads)
            try:
                if name not in references:
                    references[name] = Sessions(partial(create_model, name), size, Path(place, name), threads)
                reference = references[name](runtime, precision)
                found = equal_latency(partial(_ratio, opened, reference, rounds), ablation.can_have, ablation.depths)
            except DiskFull:
                raise
            except Exception as error:  # a runtime that cannot have it: the rest goes on
                say(f"{base} keeps its usual depth: {first_line(error)}")
                continue
            network = ablation.at(found.third, found.more).name
            if not found.ok:
                say(f"{network}: {found.ratio:.3f} of {name}'s latency is the nearest that was found")
            ratio = round(found.ratio, 4)
            told = found.third, found.more, ratio, found.tried
            done.append(Depth(network, name, runtime, precision, machine(), threads, *told, day=today()))
            write_rows(file, [asdict(one) for one in done])
    return at_depths(rows, [one for one in done if (one.runtime, one.precision) == setup])


def at_depths(rows: Sequence[PaperRow], known: Sequence[Depth]) -> tuple[list[PaperRow], list[Depth]]:
    """Rows of ablations with the last depths that are known of them, and these depths; the others as they are."""
    ablations, by_name = _ablations(rows), {depth.network.partition("@")[0]: depth for depth in known}
    depths = {a.variant.name: by_name[a.variant.name] for a in ablations if a.reference and a.variant.name in by_name}
    chosen = {name: (depth.third, depth.more) for name, depth in depths.items()}
    return [ablation_row(a, chosen.get(a.variant.name, a.depths)) for a in ablations], list(depths.values())


def _ablations(rows: Sequence[PaperRow]) -> list[Ablation]:
    return [a for a in ABLATIONS if a.variant.name in {row.network.partition("@")[0] for row in rows}]


def _opened(
    ablation: Ablation, stem: Path, runtime: str, precision: str, threads: int, third: int, more: int
) -> tuple[str, Session]:
    network = ablation.at(third, more).name
    draw = partial(create_model, network)
    return network, Sessions(draw, SIZES[ablation.table], stem, threads)(runtime, precision)


def _ratio(
    opened: Callable[[int, int], tuple[str, Session]], reference: Session, rounds: int, third: int, more: int
) -> float:
    network, session = opened(third, more)
    pair = [("reference", reference), (network, session)]
    ratio = benchmark(pair, rounds=rounds, resident=True)[1].ratio
    if near(ratio):  # perhaps by chance: of many that are tried, it would be the lucky one that is taken
        ratio = benchmark(pair, rounds=AGAIN * rounds, resident=True)[1].ratio
    say(f"{network}: {third} blocks in stage 3, {more:+} in stage 2, {ratio:.3f} of the reference's latency")
    return ratio
