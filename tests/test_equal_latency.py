"""The search for a depth: on latencies that are known, with steps finer and coarser than the tolerance, and noise."""

import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from nextvit import equal_latency as equal
from nextvit.ablations import ABLATIONS
from nextvit.equal_latency import TOLERANCE, Depth, at_depths, equal_latency, of_equal_latency
from nextvit.errors import UserError
from nextvit.files import write_rows
from nextvit.paper import paper_rows
from nextvit.reproduce import read_records

SEARCHED = [a for a in ABLATIONS if a.reference]


def device(fixed: float, block: float, second: float, noise: float = 0.0):
    """Latencies relative to a reference: of all else, of a block of stage 3 and of a block of stage 2."""
    source = random.Random(0)
    return lambda third, more: (fixed + third * block + more * second) * (1 + source.uniform(-noise, noise))


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize("start", [(1, 0), (6, 0), (40, 0), (6, 2), (20, -2)])
@pytest.mark.parametrize(
    ("fixed", "block", "second"), [(0.5, 0.04, 0.05), (0.3, 0.011, 0.03), (0.6, 0.09, 0.05), (0.45, 0.13, 0.04)]
)
def test_it_comes_within_the_tolerance(fixed, block, second, start, noise):
    for ablation in SEARCHED:
        ratio_of = device(fixed, block, second, noise)
        found = equal_latency(ratio_of, ablation.can_have, start)
        assert found.ok
        assert abs(device(fixed, block, second)(found.third, found.more) - 1) <= TOLERANCE + noise
        assert ablation.can_have(found.third, found.more)
        assert found.tried <= 8


def test_what_cannot_be_reached_ends_and_says_so():
    found = equal_latency(device(1.4, 0.05, 0.05), SEARCHED[0].can_have, (10, 0))
    assert not found.ok
    assert found.third == 1
    assert found.tried <= 14


def test_each_depth_is_measured_once():
    asked = []
    equal_latency(lambda n, m: asked.append((n, m)) or 0.45 + 0.13 * n + 0.04 * m, SEARCHED[0].can_have, (12, 1))
    assert len(asked) == len(set(asked))


# ---- of a table's rows, and what is kept -----------------------------------------------------------------------------


@pytest.fixture
def known_device(monkeypatch):
    """A machine whose latencies are counted, not measured: a block of stage 3 costs 0.04 of the reference's."""
    asked = []

    def counted(opened, reference, rounds, third, more):
        network, _ = opened(third, more)
        asked.append(network)
        if network.startswith("table1_cctt"):
            raise RuntimeError("this runtime has no such operator\nand more")
        return 0.5 + 0.04 * third + 0.05 * more

    monkeypatch.setattr(equal, "_ratio", counted)
    monkeypatch.setattr(equal, "_opened", lambda a, stem, runtime, precision, threads, n, m: (a.at(n, m).name, None))
    monkeypatch.setattr(equal, "Sessions", lambda *arguments: lambda runtime, precision: None)
    monkeypatch.setattr(equal, "create_model", lambda name: name)
    return asked


def test_what_no_depth_makes_slow_enough_is_given_up_at_the_deepest():
    found = equal_latency(device(0.4, 0.004, 0.01), SEARCHED[0].can_have, (8, 0))
    assert (found.third, found.more, found.ok) == (80, 1, False)  # stage 2 was tried once, and promised too little
    assert found.tried <= 5


def test_depths_are_kept_and_not_searched_again(known_device, tmp_path, capsys):
    rows, file = paper_rows("table1"), tmp_path / "table1-depths.csv"
    found, depths = of_equal_latency(rows, file, ("torch", "fp32"), threads=1)
    searched = [row for row in rows if not row.network.startswith("table1_cctt")]
    assert len(depths) == len(searched) == len(rows) - 1
    assert all(0.97 <= depth.ratio <= 1.03 and depth.ok for depth in depths)
    assert {depth.network for depth in depths} | {"table1_cctt@9,-2"} == {row.network for row in found}
    for usual, depth in zip(searched, depths, strict=True):
        row = next(row for row in found if row.network == depth.network)
        assert f"{depth.third} blocks" in row.name
        assert row.printed == usual.printed
    assert (
        "table1_cctt keeps its usual depth: RuntimeError: this runtime has no such operator" in capsys.readouterr().err
    )

    before = len(known_device)
    again, same = of_equal_latency(rows, file, ("torch", "fp32"), threads=1)
    assert (again, same) == (found, depths)
    assert len(known_device) == before + 1  # the one that failed was tried again
    known = read_records(file, Depth)
    assert at_depths(rows, known) == (found, depths)
    other = replace(known[0], third=3, network="table1_cccc@3,0", runtime="onnx")
    assert at_depths(rows, [*known, other])[0][0].network == "table1_cccc@3,0"  # the last one that is known


def test_a_network_that_is_its_reference_keeps_its_depth_whatever_a_file_says():
    (row,) = [row for row in paper_rows("table7") if row.name == "NCB (ours)"]
    told = Depth("table7_ncb@9,0", "nextvit_small", "torch", "fp32", "a machine", 1, 9, 0, 1.0, 1)
    assert at_depths([row], [told]) == ([row], [])


def test_rows_without_a_reference_keep_their_depth(known_device, tmp_path):
    rows = paper_rows("table8")
    assert of_equal_latency(rows, tmp_path / "d.csv", ("torch", "fp32"), threads=1) == (list(rows), [])
    assert known_device == []


def test_depths_of_another_machine_are_refused(tmp_path):
    file = tmp_path / "d.csv"
    other = Depth("table1_cccc", "nextvit_small", "torch", "fp32", "another", 1, 15, 0, 1.0, 1)
    write_rows(file, [asdict(other)])
    with pytest.raises(UserError, match="was measured on another, with 1 threads, and not on"):
        of_equal_latency(paper_rows("table1"), file, ("torch", "fp32"), threads=1)


@pytest.mark.parametrize(
    ("first", "again", "told"), [(1.01, 1.08, 1.08), (0.98, 1.0, 1.0), (1.2, 1.0, 1.2)], ids=["luck", "near", "far"]
)
def test_what_seems_near_is_measured_again_and_longer(first, again, told, monkeypatch):
    """A short measurement that is near by chance must not end the search."""
    asked = []

    def measured(pair, *, rounds, resident):
        asked.append(rounds)
        return [None, SimpleNamespace(ratio=first if len(asked) == 1 else again)]

    monkeypatch.setattr(equal, "benchmark", measured)
    assert equal._ratio(lambda third, more: ("it", None), None, 8, 4, 0) == told
    assert asked == ([8, 24] if first < 1.1 else [8])
