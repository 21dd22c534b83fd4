"""Formats beside ONNX and OpenVINO: written whole, run where they can be, and not said to be right where not."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nextvit
from nextvit.data.images import normalise, pixels
from nextvit.errors import MissingExtra, ParityError, UserError
from nextvit.exporters import coreml, executorch, quantization
from nextvit.exporters.calibration import Calibration
from nextvit.exporters.form import export_form
from nextvit.exporters.job import Job
from nextvit.exporters.parity import real_images
from nextvit.exporters.program import quantized
from nextvit.files import OPEN_SEAL, check_seal, close_seal, parts
from nextvit.formats import FORMATS, Free, format_of
from nextvit.runtime.coreml_session import not_here
from nextvit.runtime.open import open_session
from tests.conftest import fill, nextvit_here

OTHERS = [".pt2", ".pte", ".mlpackage", ".aimodel", ".engine"]
SLOW = (".pte", ".aimodel")
OPENED = {".engine": ".engine.onnx"}  # what nextvit opens of a format that is more than one file


@pytest.fixture(scope="module")
def model():
    return fill(nextvit.create_model("nextvit_nano", num_classes=5))


@pytest.fixture(
    scope="module", params=[pytest.param(end, marks=pytest.mark.slow) if end in SLOW else end for end in OTHERS]
)
def written(request, model, tmp_path_factory):
    """A file of one size, 64 pixels, which is soon made."""
    path = tmp_path_factory.mktemp("format") / f"m{request.param}"
    precision = "fp16" if request.param in (".mlpackage", ".engine") else "fp32"
    return path, nextvit.export(model, path, image_size=64, dynamic=False, precision=precision)


def test_the_report_claims_what_was_run_and_nothing_else(written):
    path, report = written
    assert report.format == format_of(path).name
    if report.parity is None:
        assert report.not_run.startswith("needs macOS")
    else:
        assert report.parity.ok
        assert report.parity.live
        assert report.parity.top1_agreement == 100
    assert (report.not_run is None) == (path.suffix in (".pt2", ".pte"))
    kept = {"m.engine.onnx", "m.engine.sh"} if path.suffix == ".engine" else {path.name}
    left = {file.name for file in path.parent.iterdir()}
    assert left == {*kept, f"{path.name}.json", f"{path.name}.example"}
    files = [file for name in kept for file in parts(path.parent / name)]
    assert report.bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.001)
    assert json.loads((path.parent / f"{path.name}.json").read_text())["not_run"] == report.not_run


def test_what_can_be_run_answers_as_the_model_does(written, model):
    path, report = written
    if report.parity is None:
        with pytest.raises(UserError, match=r"needs macOS|does not run them yet"):
            nextvit.load(path)
        return
    predictor = nextvit.load(path.with_name(f"m{OPENED.get(path.suffix, path.suffix)}"), threads=1)
    assert predictor.session.setup.threads == 1
    assert predictor.metadata.preprocess.image_size == 64
    batch = np.random.default_rng(0).standard_normal((3, 3, 64, 64), dtype=np.float32)  # the file takes one at a time
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    bound = 1e-4 if report.precision == "fp32" else 2e-2
    assert np.abs(predictor.run(batch) - expected).max() < bound * np.abs(expected).max()
    with pytest.raises(Exception, match=r"(?i)dimension|shape|size|pixels|input of"):
        predictor.run(np.zeros((1, 3, 160, 128), np.float32))
    with pytest.raises(UserError, match=r"leave --precision out|needs"):
        nextvit.load(path.with_name(f"m{OPENED.get(path.suffix, path.suffix)}"), precision="bf16")


def test_the_example_beside_the_file_runs(written):
    path, report = written
    folder = path.with_name(f"{path.name}.example")
    names = {file.name for file in folder.iterdir()} - {"run.py"}
    assert names == {"image.png", "image.rgb", "logits.f32", "expected.json"}
    assert (folder / "run.py").exists() == (path.suffix != ".aimodel")
    if report.parity is None:
        assert json.loads((folder / "expected.json").read_text())["tolerance"] is None
        return
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _run_and_fail(command, folder):
    """The program agrees with the expected answer, and says so when the answer is changed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout
    kept = (folder / "expected.json").read_text(), (folder / "logits.f32").read_bytes()
    expected = json.loads(kept[0])
    expected["logits"][0] += 10 * expected["tolerance"]
    (folder / "expected.json").write_text(json.dumps(expected))
    (folder / "logits.f32").write_bytes(np.array(expected["logits"], "<f4").tobytes())
    assert subprocess.run(command, cwd=folder, capture_output=True, timeout=300).returncode == 1
    (folder / "expected.json").write_text(kept[0])
    (folder / "logits.f32").write_bytes(kept[1])


@pytest.mark.slow
@pytest.mark.parametrize("preprocess", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_of_openvino_runs_in_python_and_compiles_and_runs_in_cpp(preprocess, model, tmp_path):
    import openvino

    nextvit.export(model, tmp_path / "m o.xml", image_size=64, preprocess=preprocess)
    folder = tmp_path / "m o.xml.example"
    _run_and_fail([sys.executable, str(folder / "run.py")], folder)
    home = Path(openvino.__file__).parent
    libraries = [str(file) for file in (home / "libs").glob("libopenvino.so.*")]
    options = ["-std=c++17", f"-I{home / 'include'}", *libraries, f"-Wl,-rpath,{home / 'libs'}", "-o", "run"]
    built = subprocess.run(["g++", "run.cpp", *options], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    _run_and_fail([str(folder / "run")], folder)


@pytest.mark.parametrize("preprocess", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_of_onnx_runs_in_python_and_in_javascript(preprocess, model, tmp_path):
    nextvit.export(model, tmp_path / 'a "b" #1.onnx', image_size=64, dynamic=False, preprocess=preprocess)
    folder = tmp_path / 'a "b" #1.onnx.example'
    _run_and_fail([sys.executable, str(folder / "run.py")], folder)
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    packages = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-web@1.23"]
    if subprocess.run(packages, cwd=folder, capture_output=True, timeout=300).returncode:
        pytest.skip("npm cannot fetch onnxruntime-web")
    _run_and_fail(["node", "run.mjs"], folder)


def test_executorch_files_of_other_threads_are_not_open_at_once(written):
    """Its one pool of threads cannot be changed under an open file: both would hang."""
    path, _ = written
    if path.suffix == ".pte":
        first = open_session(path, threads=1)
        assert open_session(path).setup.threads == 1
        with pytest.raises(UserError, match="a file that is open has 1, not 2"):
            open_session(path, threads=2)
        del first
        assert open_session(path, threads=2).setup.threads == 2


def test_a_flipped_bit_is_found_in_every_part(written):
    path, _ = written
    path = path.with_name(f"m{OPENED.get(path.suffix, path.suffix)}")
    assert check_seal(path)
    for part in parts(path):
        good = part.read_bytes()
        for place in np.linspace(0, len(good) - 1, 12).astype(int):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 8)
            part.write_bytes(bad)
            assert not _whole(path)
        part.write_bytes(good)
    assert _whole(path)


def _whole(path):
    try:
        return check_seal(path)
    except UserError:
        return False


def test_a_folder_of_an_older_export_is_replaced_whole_or_left(model, tmp_path, monkeypatch):
    from nextvit.exporters import coreai

    path = tmp_path / "m.aimodel"
    path.mkdir()
    (path / "mine").write_text("somebody's own")
    with pytest.raises(UserError, match="none that nextvit wrote"):
        nextvit.export(model, path, image_size=64, dynamic=False)
    (path / "mine").rename(path / "old")
    (path / "old").write_text(OPEN_SEAL)

    def broken(*_, **__):
        raise ParityError("as if it answered otherwise")

    with monkeypatch.context() as patch:
        patch.setattr(coreai, "close_seal", broken)
        with pytest.raises(ParityError):
            nextvit.export(model, path, image_size=64, dynamic=False)
    assert [file.name for file in tmp_path.rglob("*")] == ["m.aimodel", "old"]
    nextvit.export(model, path, image_size=64, dynamic=False)
    assert not (path / "old").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.aimodel", "m.aimodel.example", "m.aimodel.json"]


@pytest.mark.slow
def test_a_coreml_package_takes_an_image_and_gives_a_label(tmp_path):
    import coremltools

    model = fill(nextvit.create_model("nextvit_nano", num_classes=3))
    model.metadata = replace(model.metadata, labels=("crane", "dog", "crane"))
    nextvit.export(model, tmp_path / "m.mlpackage", image_size=64, precision="fp16")
    described = coremltools.utils.load_spec(str(tmp_path / "m.mlpackage")).description
    (image,) = described.input
    assert coremltools.proto.FeatureTypes_pb2.ImageFeatureType.ColorSpace.Name(image.type.imageType.colorSpace) == "RGB"
    assert image.type.imageType.imageSizeRange.widthRange.upperBound == 2048
    assert {output.name for output in described.output} == {"label", "label_probs", "logits"}
    assert described.predictedFeatureName == "label"
    package = coremltools.models.MLModel(str(tmp_path / "m.mlpackage"), skip_model_load=True)
    program = package.get_spec().mlProgram.functions["main"]
    operations = {op.type for block in program.block_specializations.values() for op in block.operations}
    assert {"conv", "softmax", "classify"} <= operations
    assert not {"batch_norm", "layer_norm"} & operations
    labels = str(program)
    assert all(name in labels for name in ("crane (0)", "dog", "crane (2)")), "a dictionary needs different names"


@pytest.mark.slow
def test_spatial_pooling_goes_to_coreml_too(tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=3, kv_pooling="spatial"))
    assert nextvit.export(model, tmp_path / "m.mlpackage", image_size=64, dynamic=False).not_run == not_here()


def test_pixels_of_a_prepared_image_are_those_that_it_was_made_of(model):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    p = model.metadata.preprocess
    assert np.array_equal(pixels(normalise(image, p), p), image)


@pytest.mark.slow
def test_the_command_that_builds_an_engine_is_written_out(tmp_path, model):
    report = nextvit.export(model, tmp_path / "it's.engine", image_size=64, precision="fp16")
    assert report.not_run == "needs TensorRT: there is no trtexec here"
    assert report.parity.setup.runtime.startswith("onnxruntime")
    script = tmp_path / "it's.engine.sh"
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    (tmp_path / "trtexec").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    (tmp_path / "trtexec").chmod(0o755)
    told = subprocess.run(["sh", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert told.stdout.splitlines() == [
        "--onnx=it's.engine.onnx",
        "--saveEngine=it's.engine",
        "--stronglyTyped",
        "--minShapes=image:1x3x32x32",
        "--optShapes=image:8x3x64x64",
        "--maxShapes=image:32x3x128x128",
    ]
    with pytest.raises(UserError, match=r"opens the ONNX written beside one, .*it's\.engine\.onnx"):
        nextvit.load(tmp_path / "it's.engine")
    assert nextvit.load(tmp_path / "it's.engine.onnx").metadata.precision == "fp16"


@pytest.mark.slow
def test_int8_for_tensorrt_is_signed_and_symmetric(tmp_path, model):
    import onnx

    images = [image.rotate(90 * turn) for turn in range(3) for image in real_images()]
    path = tmp_path / "m.engine"
    report = nextvit.export(model, path, image_size=64, precision="int8", calibration=images, max_drop=None)
    assert report.accuracy.metric == "agreement"
    graph = onnx.load(f"{path}.onnx").graph
    zeros = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in zeros]
    assert values
    assert all(value.dtype == np.int8 and not value.any() for value in values)


def test_the_part_that_suffers_most_is_found():
    model = fill(nextvit.create_model("nextvit_nano", num_classes=5))
    victim = "stages.2.blocks.1"
    model.get_submodule(victim).mlp.fc1.weight.data[:, 0] *= 300  # one column sets the scales of all

    images = list(np.random.default_rng(0).standard_normal((4, 1, 3, 64, 64), dtype=np.float32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ranked = quantization.sensitive_parts(model, images)
    assert ranked[0] == victim
    assert set(ranked) >= {"stem", "head", "stages.3.blocks.1"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("writer", [executorch, pytest.param(coreml, marks=pytest.mark.slow)])
def test_parts_that_are_to_stay_float_have_float_weights_and_all_others_have_not(writer, model):
    part, images = "stages.2.blocks.1", list(np.random.default_rng(0).standard_normal((2, 1, 3, 64, 64), dtype="f4"))
    metadata = replace(model.metadata.with_image_size(64), precision="int8")
    form, plan = export_form(model, fixed=True), quantization.Plan(float_parts=(part,))
    job = Job(form, Path("unwritten"), metadata, Free(False, False), Calibration(images, images, images), plan)
    graph = quantized(job, {"batch": 1, "side": 64}, writer._quantizer(plan)).graph
    in_float, rounded = set(), set()
    for node in graph.nodes:
        if node.op == "call_function" and re.search("conv2d|linear", str(node.target)):
            layer = [path for path, _ in node.meta["nn_module_stack"].values()][-1]
            (rounded if "dequantize" in str(node.args[1].target) else in_float).add(layer)
    inside = {name for name, m in form.named_modules() if isinstance(m, torch.nn.Conv2d) and name.startswith(part)}
    if writer is executorch:
        assert in_float == inside
    else:  # coremltools' configuration also leaves what reads both from the part and from outside
        assert inside <= in_float
        assert len(in_float - inside) <= 1
    assert len(rounded) > 40


@pytest.mark.parametrize(
    ("ending", "module", "extra"),
    [
        (".onnx", "onnxslim", "onnx"),
        (".xml", "openvino", "openvino"),
        (".pte", "executorch.exir", "executorch"),
        (".mlpackage", "coremltools", "coreml"),
        (".aimodel", "coreai_torch", "coreai"),
        (".engine", "onnxslim", "tensorrt"),
    ],
)
def test_a_format_whose_library_is_missing_is_refused_before_any_work(
    ending, module, extra, model, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=re.escape(f'pip install "nextvit[{extra}]"')):
        nextvit.export(model, tmp_path / f"m{ending}")
    assert not list(tmp_path.iterdir())
    assert any(fmt.extra == extra for fmt in FORMATS)


def test_sides_below_64_are_fixed_and_the_report_says_so(model, tmp_path):
    assert nextvit.export(model, tmp_path / "m.mlpackage", image_size=32).notes[0].startswith("the sides are fixed")
    report = nextvit.export(model, tmp_path / "m.pt2", image_size=32)
    assert report.notes == ("the sides are fixed: torch leaves them open from 64 pixels up only",)
    assert {(row.height, row.width) for row in report.parity.rows} == {(32, 32)}
    assert {row.batch for row in report.parity.rows} >= {1, 2, 5}, "the batch is open all the same"


# ---- files that are programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".aoti.pt2", marks=pytest.mark.slow)])
def test_a_program_from_elsewhere_is_opened_only_for_one_who_trusts_it(ending, model, tmp_path, monkeypatch):
    """One guard is added, as an attacker would who knows the seal; torch evaluates it as Python."""
    canary, path = tmp_path / "canary", tmp_path / f"m{ending}"
    nextvit.export(model, tmp_path / "ours.pt2", image_size=64, dynamic=False)
    nextvit.load(tmp_path / "ours.pt2")
    with zipfile.ZipFile(tmp_path / "ours.pt2") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("models/model.json"))
    program = json.loads(entries[name])
    program["guards_code"] = [f"__import__('pathlib').Path({str(canary)!r}).touch() is None"]
    entries[name] = json.dumps(program).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
        archive.comment = OPEN_SEAL.encode()
    close_seal(path)
    with pytest.raises(UserError, match="opening it runs it as a program"):
        nextvit.load(path)
    for verb in (["info", path], ["predict", path, tmp_path], ["eval", path, "demo"], ["benchmark", path]):
        done = nextvit_here(*verb)
        assert (done.returncode, "--trust" in done.stderr) == (2, True), done.stderr
    assert not canary.exists()
    if ending == ".pt2":
        nextvit.load(path, trust=True).run(np.zeros((1, 3, 64, 64), np.float32))
        assert canary.exists(), "so it is a program indeed"
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "of somebody else"))
    with pytest.raises(UserError, match="was not exported on this machine by you"):
        nextvit.load(tmp_path / "ours.pt2")


# ---- all of it at full size -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("ending", [*OTHERS, ".aoti.pt2", ".onnx", ".xml"])
@pytest.mark.parametrize("name", ["nextvit_nano", "nextvit_small"])
def test_every_format_takes_the_variants_with_free_and_with_fixed_sizes(name, ending, dynamic, tmp_path):
    network = fill(nextvit.create_model(name))
    report = nextvit.export(network, tmp_path / f"m{ending}", dynamic=dynamic)
    if report.parity is None:
        assert report.not_run
        return
    assert report.parity.ok
    sizes = {(row.height, row.width) for row in report.parity.rows}
    assert len(sizes) == (2 if dynamic else 1)
    session = open_session(tmp_path / f"m{OPENED.get(ending, ending)}", trust=True)
    batch = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(batch)).numpy()
    assert np.abs(session(batch) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pte", ".mlpackage"])
def test_int8_by_pt2e_is_small_and_keeps_the_answers(ending, model, tmp_path):
    images = [image.rotate(90 * turn) for turn in range(3) for image in real_images()]
    path = tmp_path / f"m{ending}"
    report = nextvit.export(model, path, image_size=64, precision="int8", calibration=images, dynamic=False)
    assert report.bytes < 0.4 * 4 * sum(p.numel() for p in model.parameters())
    if ending == ".pte":
        assert report.accuracy.agreement >= 90
        assert report.float_layers == ()
    else:
        assert report.accuracy is None
        assert report.not_run == not_here()
