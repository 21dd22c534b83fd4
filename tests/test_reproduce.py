"""The paper's tables on this machine: what is printed is what the files hold, and what is told of it follows."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit import reproduce
from nextvit.accuracies import GIVEN, Score, read_scores
from nextvit.create import create_model
from nextvit.data.images import preprocess
from nextvit.devices import fast_precisions, processor_name
from nextvit.equal_latency import Depth
from nextvit.errors import DiskFull, ParityError, UserError
from nextvit.exporters.parity import real_images
from nextvit.files import write_rows
from nextvit.foreign import preprocess_of
from nextvit.paper import ACCURACY, CLAIMS, EXPLAINED, TABLES, Claim, PaperRow, paper_rows
from nextvit.peers import PEERS
from nextvit.reproduce import (
    Count,
    Latency,
    chosen_setups,
    counts,
    held,
    measure,
    pareto_front,
    rank_correlation,
    read_latencies,
)
from nextvit.reproduced import (
    count_rows,
    latency_rows,
    order_rows,
    rerun,
    write_readme,
)
from nextvit.runtime import onnxruntime_session
from nextvit.runtime.onnxruntime_session import PROVIDERS, starts
from nextvit.tradeoff import _measured_setups, _panels, trade_off
from tests.conftest import REPOSITORY, nextvit_here

ROWS = {table: paper_rows(table) for table in TABLES}
TINY = (  # of no paper: small enough to measure within a test
    PaperRow("table4", "Small", "timm:resnet10t", 64, {"tensorrt_ms": 2.0, "top1": 70.0}),
    PaperRow("table4", "None", "timm:no_such_network", 64, {"tensorrt_ms": 1.0, "top1": 60.0}),
    PaperRow("table4", "Nano", "nextvit_nano", 64, {"tensorrt_ms": 1.0, "top1": 72.0}),
)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
NO_TENSORRT = pytest.mark.skipif(starts("tensorrt"), reason="TensorRT is there")
NO_MAC = pytest.mark.skipif(sys.platform == "darwin", reason="CoreML is there")
SETUP = [("torch", "fp32")]  # others need minutes of export; the pages' commands run them


def latency(row: str, ratio: float | None, width: float = 0.01) -> Latency:
    if ratio is None:
        return Latency(row, "onnx", "fp32", 1, "a machine", 1, why="it could not be")
    return Latency(row, "onnx", "fp32", 1, "a machine", 1, ratio * 10, ratio, ratio - width, ratio + width)


# ---- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "count"), [("table4", 52), ("table5", 33), ("table6", 32)])
def test_every_row_of_a_table_is_there_once(table, count):
    keys = [row.key for row in ROWS[table]]
    assert len(keys) == len(set(keys)) == count


@pytest.mark.parametrize(
    ("table", "key", "printed"),
    [
        ("table4", "Next-ViT-S 224", {"params_m": 31.7, "flops_g": 5.8, "tensorrt_ms": 7.7, "top1": 82.4}),
        ("table5", "Next-ViT-L 512", {"fpn_flops_g": 331, "upernet_miou_ms": 51.1, "tensorrt_ms": 65.3}),
        ("table6", "Next-ViT-B 512", {"box_ap_1x": 47.2, "mask_ap_3x": 44.4, "box_ap_3x": 49.4, "tensorrt_ms": 51.6}),
    ],
)  # fmt: skip
def test_figures_are_the_printed_ones(table, key, printed):
    row = next(row for row in ROWS[table] if row.key == key)
    assert {column: row.printed[column] for column in printed} == printed


def test_a_figure_that_is_not_printed_is_not_there():
    assert "tensorrt_ms" not in next(row for row in ROWS["table4"] if row.name == "Swin-T").printed


@pytest.mark.parametrize("row", [row for rows in ROWS.values() for row in rows], ids=lambda r: f"{r.table}-{r.key}")
def test_every_row_has_a_network_and_an_accuracy(row):
    if row.network.startswith("peer:"):
        assert row.network.removeprefix("peer:") in PEERS
    elif row.network.startswith("timm:"):
        preprocess_of(row.network)  # UserError where timm has none of the name
    else:
        assert row.network.startswith("nextvit_")
    assert any(column in row.printed for column in ACCURACY[row.table])


def test_explanations_and_claims_are_of_rows_that_there_are():
    keys = {(row.table, row.key) for rows in ROWS.values() for row in rows}
    assert {(table, key) for table, key, _ in EXPLAINED} <= keys
    assert {(c.table, key) for c in CLAIMS for key in (c.faster, c.slower)} <= keys


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.table}-{c.faster}-{c.slower}")
def test_claims_hold_in_the_papers_own_figures(claim):
    printed = {row.key: row.printed for row in ROWS[claim.table]}
    assert printed[claim.faster]["tensorrt_ms"] <= printed[claim.slower]["tensorrt_ms"]


# ---- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_every_cost_is_the_printed_one_or_its_difference_is_explained(table):
    counted = [counts(row) for row in ROWS[table]]
    lines = count_rows(ROWS[table], counted)
    with open(REPOSITORY / "docs" / "results" / f"{table}-costs.csv", newline="") as handle:
        committed = list(csv.DictReader(handle))
    assert committed == [{key: str(value) for key, value in line.items()} for line in lines]
    unexplained = [(line["network"], line["cost"]) for line in lines if line["flag"] and not line["why"]]
    assert unexplained == []
    flagged = {
        (table, row.key, one.column)
        for row, some in zip(ROWS[table], counted, strict=False)
        for one in some
        if one.differs
    }
    assert {key for key in EXPLAINED if key[0] == table} <= flagged  # no explanation of what agrees
    assert {line["network"] for line in lines} == {row.name for row in ROWS[table]}
    without_maps = {"CoaT Mini", "CoaT Small", "EfficientFormer-L3", "EfficientFormer-L7"}
    assert {line["network"] for line in lines if line["counted"] == "-"} <= without_maps


def test_costs_are_counted_from_the_network_and_compared_to_what_is_printed():
    resnet = next(row for row in ROWS["table4"] if row.name == "ResNet101")
    params, flops = counts(resnet)
    assert (params.counted, params.differs) == (44.55, False)
    assert flops.counted == pytest.approx(7.8, abs=0.05)
    wrong = replace(resnet, printed={"params_m": 30.0})
    assert [one.differs for one in counts(wrong)] == [True, False]


def test_attention_products_explain_a_difference_where_they_do():
    row = next(row for row in ROWS["table6"] if row.name == "CSWin-S")
    line = count_rows([row], [[Count("flops_g", 342.0, 300.45, with_attention=343.6)]])[0]
    assert line["why"] == "printed with attention products; with them it is 343.6"
    line = count_rows([row], [[Count("flops_g", 342.0, 300.45, with_attention=310.0)]])[0]
    assert line["flag"] == "differs"
    assert line["why"] == ""


@pytest.mark.parametrize("table", ["table5", "table6"])
def test_a_row_without_printed_costs_is_counted_all_the_same(table):
    row = next(row for row in ROWS[table] if row.name == "EfficientFormer-L3")
    params, flops = counts(row)
    assert (params.printed, params.counted, flops.counted) == (None, None, None)
    assert "gives no maps" in params.why


def test_a_network_that_cannot_be_built_says_why():
    params, flops = counts(TINY[1])
    assert params.counted is None
    assert "timm has no network 'no_such_network'" in params.why
    assert flops.counted is None
    assert not flops.differs


# ---- latencies -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("measured") / "table4-measured.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "ANCHOR", "nextvit_nano")
        found = measure(TINY, file, setups=SETUP, batches=(1,), threads=1)
    return file, found


def test_every_row_is_measured_or_says_why(measured):
    _, found = measured
    assert [(one.row, one.runtime) for one in found] == [(row.key, "torch") for row in TINY]
    for one in found:
        if one.row.startswith("None"):
            assert one.ms is None
            assert "no_such_network" in one.why
        else:
            low, ratio, high = one.interval
            assert low <= ratio <= high
            assert one.ms > 0
            assert one.threads == 1


def test_what_is_measured_is_read_again_and_not_measured_again(measured, monkeypatch):
    file, found = measured
    assert read_latencies(file) == found
    monkeypatch.setattr(reproduce, "benchmark", lambda *a, **k: pytest.fail("it was measured again"))
    before = file.read_bytes()
    again = measure(TINY, file, setups=SETUP, batches=(1,), threads=1)
    assert again == found
    assert file.read_bytes() == before


def test_what_could_not_be_measured_is_tried_again(measured, tmp_path, monkeypatch):
    copied = tmp_path / "measured.csv"
    copied.write_bytes(measured[0].read_bytes())
    rows = [TINY[0], replace(TINY[1], network="nextvit_nano")]
    monkeypatch.setattr(reproduce, "ANCHOR", "nextvit_nano")
    found = measure(rows, copied, setups=SETUP, batches=(1,), threads=1, rounds=8)
    (again,) = [one for one in found if one.row == "None 64"]
    assert again.ratio is not None
    assert len(found) == len(measured[1])


def test_norms_have_the_statistics_of_real_images():
    model = create_model("nextvit_nano", num_classes=3)
    reproduce._calibrate(model, 64)
    seen = []
    norm = model.stages[2].blocks[0].norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.std()))
    p = model.metadata.with_image_size(64).preprocess
    with torch.no_grad():
        model(torch.from_numpy(np.stack([preprocess(image, p) for image in real_images()])))
    assert not model.training
    assert norm.momentum == 0.1
    assert float(seen[0]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("size", "images"), [(64, 19), (256, 15), (448, 8)])
def test_statistics_are_of_fewer_images_where_they_are_larger(size, images):
    """But of eight at least."""
    model, seen = create_model("nextvit_nano", num_classes=3), []
    model.stem.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    reproduce._calibrate(model, size)
    assert seen == [(images, 3, size, size)]


def test_what_another_machine_measured_is_not_mixed_with_this_ones(measured, monkeypatch):
    file, _ = measured
    with pytest.raises(UserError, match="with 1 threads, and not on .*, with 2; name another --output"):
        measure(TINY, file, setups=SETUP, batches=(1,), threads=2)
    monkeypatch.setattr(reproduce, "machine", lambda: "another machine")
    with pytest.raises(UserError, match="and not on another machine, with 1"):
        measure(TINY, file, setups=SETUP, batches=(1,), threads=1)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="was not written by `nextvit reproduce`"):
        read_latencies(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("runtimes", "precisions", "told"),
    [
        (["tvm"], ["fp32"], "no runtime 'tvm' to reproduce with; take of torch, onnx, openvino, coreml"),
        (["onnx"], ["fp8"], "no precision 'fp8'"),
        (["onnx"], ["int8"], "none of these runtimes has one of these precisions here; take of onnx fp32"),
        pytest.param(["onnx", "coreml"], ["fp32", "fp16"], "coreml needs macOS; leave it out", marks=NO_MAC),
        pytest.param(["cuda"], ["fp16"], "cuda needs an NVIDIA GPU that torch sees; leave it out", marks=NO_GPU),
        pytest.param(["tensorrt"], (), "tensorrt needs an NVIDIA GPU, TensorRT, and a build", marks=NO_TENSORRT),
    ],
)
def test_a_setup_that_there_is_not_is_refused(runtimes, precisions, told):
    with pytest.raises(UserError, match=told):
        chosen_setups(runtimes, precisions)


def test_a_provider_that_a_build_lists_must_start(monkeypatch):
    monkeypatch.setattr(onnxruntime_session, "providers_here", lambda: list(PROVIDERS))  # as onnxruntime-gpu does
    monkeypatch.setitem(PROVIDERS, "cuda", PROVIDERS["cpu"])
    assert starts("cpu")
    assert starts("cuda")
    monkeypatch.setitem(PROVIDERS, "cuda", "NoSuchExecutionProvider")
    assert not starts("cuda")


def test_processors_of_one_name_are_told_apart_by_what_they_compute_in():
    name = processor_name()
    assert torch.backends.cpu.get_cpu_capability() in name
    assert ("BF16" in name or "AMX" in name) == ("bf16" in fast_precisions(torch.device("cpu")))
    assert reproduce.machine().startswith(name)


def test_folders_of_other_machines_are_linked(tmp_path):
    (tmp_path / "gpu").mkdir()
    write_readme(tmp_path / "gpu")
    write_readme(tmp_path)
    assert "Other machines: [gpu](gpu/README.md)." in (tmp_path / "README.md").read_text()
    assert "Other machines" not in (tmp_path / "gpu" / "README.md").read_text()


@pytest.mark.parametrize("refusals", [2, 3])
def test_weights_that_make_much_of_a_rounding_are_drawn_anew(refusals, tmp_path, monkeypatch):
    drawn, written = [], []

    def draw():
        drawn.append(create_model("nextvit_nano"))
        return drawn[-1]

    def export(network, path, **_):
        written.append(network)
        assert not path.exists()
        if len(written) <= refusals:
            raise ParityError("its outputs differ")

    monkeypatch.setattr(reproduce, "export", export)
    monkeypatch.setattr(reproduce, "open_session", lambda path, **_: path.name)
    sessions = reproduce.Sessions(draw, 32, tmp_path / "net", 1)
    if refusals < reproduce.DRAWS:
        assert sessions("onnx", "fp32") == "net-fp32.onnx"
    else:
        with pytest.raises(ParityError):
            sessions("onnx", "fp32")
    assert len(drawn) == 3
    assert not torch.equal(*(next(network.parameters()) for network in drawn[:2]))
    assert all(one is other for one, other in zip(drawn, written, strict=True))


def test_left_out_runtimes_are_all_that_are_here():
    there = chosen_setups()
    assert {("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "int8")} <= set(there)
    assert ("cuda" in dict(there)) == torch.cuda.is_available()
    assert ("coreml" in dict(there)) == (sys.platform == "darwin")
    assert there == chosen_setups(list(dict(there)), ["fp32", "fp16", "bf16", "int8"])


# ---- what follows ----------------------------------------------------------------------------------------------------


def test_the_front_is_who_nobody_beats():
    assert pareto_front([(1, 70), (2, 80), (3, 75), (2, 80), (1, 60), (4, 90)]) == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]


def test_ranks_and_not_sizes_make_the_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 200, 201, 9000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_a_reconstruction_is_no_evidence():
    rows = [
        row for row in ROWS["table4"] if row.name in ("Next-ViT-L", "TRT-ViT-D", "ConvNeXt-B") and row.image_size == 224
    ]
    found = [latency(row.key, 1.0 if row.name == "Next-ViT-L" else 0.5) for row in rows]
    assert {one.claim.slower for one in held(CLAIMS, rows, found)} == {"ConvNeXt-B 224"}
    lines = {line["network"]: line for line in latency_rows(rows, found)}
    assert lines["ConvNeXt-B"]["onnx fp32"].endswith("*")
    (reconstructed,) = [line for name, line in lines.items() if name.startswith("TRT-ViT-D")]
    assert not reconstructed["onnx fp32"].endswith("*")


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.05, "holds"), (0.93, "holds"), (1.3, "faster than that"), (0.7, "not here")]
)
def test_latencies_that_are_called_similar_are_within_a_tenth(ratio, verdict):
    (claim,) = [claim for claim in CLAIMS if claim.similar]
    rows = [row for row in ROWS["table4"] if row.key in (claim.faster, claim.slower)]
    (one,) = held([claim], rows, [latency(claim.faster, 1.0), latency(claim.slower, ratio)])
    assert one.verdict == verdict
    (wide,) = held([claim], rows, [latency(claim.faster, 1.0), latency(claim.slower, ratio, width=0.5)])
    assert wide.verdict == "within the error"


@pytest.mark.parametrize(
    ("slower", "verdict"),
    [(3.0, "holds"), (1.5, "faster, by less than printed"), (1.005, "within the error"), (0.5, "not here")],
)
def test_a_claim_is_judged_by_both_intervals(slower, verdict):
    rows = [
        PaperRow("table4", "A", "nextvit_small", 224, {"tensorrt_ms": 5.0}),
        PaperRow("table4", "B", "timm:resnet18", 224, {"tensorrt_ms": 10.0}),
    ]
    claim = Claim("table4", "A 224", "B 224")
    (one,) = held([claim], rows, [latency("A 224", 1.0), latency("B 224", slower)])
    assert (one.printed, one.verdict) == (2.0, verdict)
    assert one.low < one.measured < one.high
    assert held([claim], rows, [latency("A 224", 1.0), latency("B 224", None)]) == []
    eight = [replace(latency(f"{name} 224", ratio), batch=8) for name, ratio in (("A", 1.0), ("B", slower))]
    assert [again.setup for again in held([claim], rows, eight)] == [("onnx", "fp32", 8)]
    assert held([claim], rows, [latency("A 224", 1.0), eight[1]]) == []  # never of two batches


def test_every_batch_has_a_panel_of_its_own():
    rows = [PaperRow("table4", name, "nextvit_small", 224, {"top1": 80.0}) for name in "AB"]
    found = [replace(latency(f"{row.name} 224", 1.0), batch=batch) for row in rows for batch in (1, 8)]
    panels = _panels(rows, found, "top-1, %", {row.key: 80.0 for row in rows}, _measured_setups(found), 0)
    assert [(panel.runtime, len(panel.points)) for panel in panels] == [("onnx fp32", 2), ("onnx fp32, batch 8", 2)]


def test_a_noisy_measurement_does_not_make_a_claim_hold():
    rows = [
        PaperRow("table4", "A", "nextvit_small", 224, {"tensorrt_ms": 5.0}),
        PaperRow("table4", "B", "timm:resnet18", 224, {"tensorrt_ms": 10.0}),
    ]
    wide = replace(latency("B 224", 1.3), ratio_low=1.1, ratio_high=4.0)
    (one,) = held([Claim("table4", "A 224", "B 224")], rows, [latency("A 224", 1.0), wide])
    assert (one.low > 1, one.high > one.printed) == (True, True)
    assert one.verdict == "faster, by less than printed"


def test_accuracies_of_weights_have_panels_of_their_own_and_proxies_have_none(tmp_path):
    rows = [row for row in ROWS["table4"] if row.name in ("ResNet101", "Next-ViT-S") and row.image_size == 224]
    found = [latency(row.key, 1.0 + number) for number, row in enumerate(rows)]
    scores = [
        Score(row.network, "classify", data, of, image_size=224, percent=70.25)
        for row in rows
        for data, of in (("/mine/flowers", GIVEN), ("demo", "proxy 1"))
    ]
    scores.append(Score(rows[0].network, "segment", "/mine/ade", GIVEN, head="fpn", percent=40.0))
    trade_off(rows, found, scores, tmp_path / "p.png")
    drawn = (tmp_path / "p.svg").read_text()
    assert "<!-- top-1, %, of weights on flowers -->" in drawn
    assert "proxy" not in drawn
    assert "mIoU" not in drawn
    assert drawn.count("<!-- latency / Next-ViT-S's -->") == 6  # printed twice and here, by either accuracy


def test_what_lies_far_below_is_at_the_edge_with_its_accuracy(tmp_path):
    rows = [row for row in ROWS["table4"] if row.image_size == 224]
    found = [latency(row.key, 1.0 + number) for number, row in enumerate(rows)]
    trade_off(rows, found, [], tmp_path / "p.png")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count("<!-- DeiT-T 72.2 -->") == 3  # printed twice and here
    assert "<!-- 74 -->" not in drawn
    assert "<!-- 80 -->" in drawn


def test_a_claim_about_another_table_is_not_judged_by_this_one():
    rows = [
        PaperRow("table5", "A", "nextvit_small", 512, {"tensorrt_ms": 5.0}),
        PaperRow("table5", "B", "timm:resnet18", 512, {"tensorrt_ms": 10.0}),
    ]
    found = [latency("A 512", 1.0), latency("B 512", 2.0)]
    assert held([Claim("table6", "A 512", "B 512")], rows, found) == []


def test_lines_mark_the_front_and_tell_what_was_not_measured():
    rows = [
        PaperRow("table4", name, "nextvit_small", 224, {"top1": top1, "tensorrt_ms": ms})
        for name, top1, ms in (("A", 80.0, 5.0), ("B", 79.0, 6.0), ("C", 81.0, 7.0), ("D", 90.0, 1.0))
    ]
    found = [latency("A 224", 1.0), latency("B 224", 1.2), latency("C 224", 1.4), latency("D 224", None)]
    told = [line["onnx fp32"] for line in latency_rows(rows, found)]
    assert told[0] == "10.0 ms, 1.00 (0.99 to 1.01) *"
    assert [text.endswith("*") for text in told] == [True, False, True, False]
    assert told[3] == "not measured: it could not be"
    assert order_rows(rows, found, []) == []  # too few to be ranked


def test_the_order_here_is_compared_with_the_printed_one():
    rows = [PaperRow("table4", str(i), "nextvit_small", 224, {"tensorrt_ms": i, "coreml_ms": -i}) for i in range(1, 7)]
    found = [latency(row.key, float(10 + number)) for number, row in enumerate(rows)]
    told = {line["printed"]: line["Spearman's rho"] for line in order_rows(rows, found, [])}
    assert told == {"TensorRT, ms (printed)": "1.00", "CoreML, ms (printed)": "-1.00"}


@pytest.mark.parametrize("table", ["table4", "table1"])
@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("measured-512.csv", latency("DeiT-T 512", 1.0)),
        ("table2-depths.csv", Depth("table2_n1@5,0", "nextvit_small", "onnx", "fp32", "a machine", 1, 5, 0, 1.0, 1)),
    ],
)
def test_a_folder_is_of_one_machine(name, record, table, tmp_path):
    """Told before anything is searched or measured."""
    write_rows(tmp_path / name, [asdict(record)])
    how = {"setups": SETUP, "batches": [1], "threads": 1, "rounds": 8}
    with pytest.raises(UserError, match=f"{name} was measured on a machine, with 1 threads, and not on"):
        rerun(table, paper_rows(table)[:1], tmp_path, **how, costs_alone=False)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_records_of_an_earlier_version_lack_columns_and_are_read(tmp_path):
    record = asdict(Score("table8_r050", "classify", "demo", "proxy 1", percent=70.0))
    del record["on"]
    write_rows(tmp_path / "accuracies.csv", [record])
    (score,) = read_scores(tmp_path)
    assert (score.percent, score.on) == (70.0, "")


def test_a_part_of_a_table_leaves_the_rest_of_its_page(tmp_path):
    measured = [latency("DeiT-T 224", 1.0), latency("ResNet101 224", 1.3), latency("Next-ViT-S 224", 1.0)]
    days = "2026-11-24", "2026-11-24", "2026-11-23"
    measured = [replace(one, day=day) for one, day in zip(measured, days, strict=True)]
    measured.append(replace(latency("Swin-T 224", None), day="2026-11-26"))  # it failed: nothing is of that day
    write_rows(tmp_path / "measured-224.csv", [asdict(one) for one in measured])
    asked = [row for row in ROWS["table4"] if row.name == "PoolFormer-S24"]
    one = rerun(
        "table4", asked, tmp_path, setups=SETUP, batches=[1], threads=1, rounds=8, costs_alone=True
    )  # fmt: skip
    assert {row.name for row in one.rows} == {"DeiT-T", "ResNet101", "Next-ViT-S", "Swin-T", "PoolFormer-S24"}
    page = one.page.read_text()
    assert all(row.name in page for row in one.rows)
    assert "a machine; 1 threads; measured 2026-11-23 to 2026-11-24." in page
    measured[0] = replace(measured[0], day="")
    write_rows(tmp_path / "measured-224.csv", [asdict(one) for one in measured])
    write_readme(tmp_path)
    assert "a machine; 1 threads." in (tmp_path / "README.md").read_text()  # of an earlier version, without days


def test_what_is_gone_is_not_shown(tmp_path):
    write_rows(tmp_path / "measured-224.csv", [asdict(latency("DeiT-T 224", 1.0))])
    asked = [row for row in ROWS["table4"] if row.name == "DeiT-T"]
    how = {"setups": SETUP, "batches": [1], "threads": 1, "rounds": 8, "costs_alone": True}
    rerun("table4", asked, tmp_path, **how)
    drawn = {"table4-latency.csv", "table4-tradeoff.png", "table4-tradeoff.svg", "table4-tradeoff.html"}
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "measured-224.csv").unlink()
    one = rerun("table4", asked, tmp_path, **how)
    assert not drawn & {path.name for path in tmp_path.iterdir()}
    assert "data:image" not in one.page.read_text()


def test_a_full_disk_ends_the_run_and_is_no_fault_of_a_row(tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise DiskFull("cannot write: no space")

    monkeypatch.setattr(reproduce, "benchmark", full)
    with pytest.raises(DiskFull):
        measure(TINY[2:], tmp_path / "measured-64.csv", setups=SETUP, threads=1, rounds=8)
    assert not (tmp_path / "measured-64.csv").exists()


def test_what_cannot_be_written_here_is_not_measured(monkeypatch):
    honest = reproduce.installed
    assert ("openvino", "int8") in chosen_setups()
    monkeypatch.setattr(reproduce, "installed", lambda module: module not in ("nncf", "onnxscript") and honest(module))
    assert {runtime for runtime, _ in chosen_setups()} & {"onnx", "openvino"} == set()
    with pytest.raises(UserError, match="openvino needs onnxscript; leave it out"):
        chosen_setups(["openvino"])
    monkeypatch.setattr(reproduce, "installed", lambda module: module != "nncf" and honest(module))
    assert ("openvino", "fp32") in chosen_setups()
    assert ("openvino", "int8") not in chosen_setups()


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_leaves_a_page_tables_and_the_plot(tmp_path):
    asked = ("reproduce", "table4", "--only", "DeiT-T", "--runtimes", "torch", "--precision", "fp32", "--threads", 1)
    done = nextvit_here(*asked, "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [one["row"] for one in shown["table4"]["latencies"]] == ["DeiT-T 224"]
    assert {one["column"] for one in shown["table4"]["costs"]} == {"params_m", "flops_g"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {
        "table4.html",
        "table4-tradeoff.png",
        "table4-tradeoff.svg",
        "table4-tradeoff.html",
        "table4-costs.csv",
        "table4-latency.csv",
    }
    page = (tmp_path / "table4.html").read_text()
    days = {one["day"] for one in shown["table4"]["latencies"]}
    assert f"1 threads; measured {min(days)}." in (tmp_path / "README.md").read_text()
    assert "DeiT-T" in page
    assert "the distilled network" in page
    with open(tmp_path / "table4-latency.csv", newline="") as handle:
        (line,) = csv.DictReader(handle)
    assert line["top-1, %"] == "72.2"
    assert re.fullmatch(r"\d+\.\d ms, \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", line["torch fp32"])  # alone


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """Figure 1 of a few rows whose latencies are given, not measured: with --costs nothing is."""
    folder = tmp_path_factory.mktemp("figure")
    names = {"Next-ViT-S": 1.0, "ResNet101": 1.3, "PoolFormer-S24": 2.0, "TRT-ViT-C": 1.2}
    for size in (224, 512):
        found = [latency(f"{name} {size}", ratio) for name, ratio in names.items()]
        write_rows(folder / f"measured-{size}.csv", [asdict(one) for one in found])
    only = [flag for name in names for flag in ("--only", name)]
    done = nextvit_here("reproduce", "figure1", "--costs", *only, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_figure_1_has_three_tasks_and_printed_beside_measured(figure):
    svg = (figure / "figure1.svg").read_text()
    assert svg.count("<!-- latency / Next-ViT-S's -->") == 9  # three tasks; TensorRT, CoreML and here
    for told in ("TensorRT (printed)", "CoreML (printed)", "onnx fp32", "top-1, %", "box AP, 1x"):
        assert f"<!-- {told} -->" in svg
    assert (figure / "figure1.png").stat().st_size > 20_000
    assert {f"table{n}.html" for n in (4, 5, 6)} <= {path.name for path in figure.iterdir()}


@pytest.mark.slow
def test_the_folder_tells_in_markdown_what_it_has(figure):
    text = (figure / "README.md").read_text()
    assert "a machine; 1 threads." in text
    assert text.index("figure1.png") < text.index("## Table 4") < text.index("## Table 6")
    assert "4 of 33 rows; latencies on onnx fp32 of 4." in text
    assert "| TRT-ViT-C (a reconstruction, fitted to the printed totals) | 224 |" in text
    assert "| Next-ViT-S | 512 | nextvit_small | fpn_params_m |" not in text  # pixels are Table 4's alone
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (figure / link).exists()
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        assert len({line.count(" | ") for line in block.splitlines()[2:]}) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="a browser is needed")
def test_a_browser_draws_the_page_with_every_point(figure, tmp_path):
    page, picture = (figure / "figure1.html").as_uri(), tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1700,1300"]
    shot = [*command, "--virtual-time-budget=15000", f"--screenshot={picture}", page]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    orange = (abs(pixels - [224, 123, 40]) < 12).all(axis=2)
    assert orange.sum() > 300  # Next-ViT's points, and the legend's
    assert (pixels.min(axis=2) < 250).mean() > 0.005
    tree = subprocess.run(
        [*command, "--virtual-time-budget=15000", "--dump-dom", page], check=True, capture_output=True, timeout=120
    ).stdout.decode()
    drawn = re.findall(r'class="legendtext"[^>]*data-unformatted="([^"]+)"', tree)
    assert sorted(drawn) == ["Next-ViT", "Next-ViT 384", "PoolFormer", "ResNet", "TRT-ViT", "TRT-ViT (reconstruction)"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["table12"], "there is no 'table12' to reproduce; take one of table1, table2, table4, table5"),
        (["table4", "--only", "VGG"], "no row of table4 has 'VGG' in its name"),
        (["table4", "--batch-size", "0"], "--batch-size takes whole numbers from 1"),
    ],
)
def test_what_cannot_be_reproduced_is_told_at_once(arguments, told, tmp_path):
    done = nextvit_here("reproduce", *arguments, "--output", tmp_path)
    assert done.returncode == 2
    assert told in done.stderr


def test_the_anchor_is_a_network_of_ours():
    assert create_model(reproduce.ANCHOR).metadata.variant == "nextvit_small"
