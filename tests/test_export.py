"""Exported files answer as the model does, at sizes and batches that were not traced, or are not written."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

import nextvit
from nextvit.errors import ParityError, UserError
from nextvit.exporters import export as exporting
from nextvit.files import parts
from nextvit.runtime.open import open_session
from tests.conftest import fill, nextvit_here
from tests.conftest import nextvit as run

ENDINGS = [".onnx", ".xml"]


@pytest.fixture(
    scope="module",
    params=[
        ("nextvit_nano", "sequence"),
        pytest.param(("nextvit_nano", "spatial"), marks=pytest.mark.slow),
        pytest.param(("nextvit_small", "sequence"), marks=pytest.mark.slow),
    ],
)
def model(request):
    return fill(nextvit.create_model(request.param[0], kv_pooling=request.param[1]))


@pytest.fixture(scope="module", params=ENDINGS)
def exported(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / f"m{request.param}"
    return model, path, nextvit.export(model, path)


def test_one_file_agrees_with_eager_at_every_size_and_batch(exported):
    model, path, _ = exported
    session = open_session(path)
    for shape in (
        (1, 3, 224, 224),
        (2, 3, 256, 320),
        (7, 3, 200, 232),
        (2, 3, 384, 384),
        (1, 3, 32, 32),
        (3, 3, 33, 47),
    ):
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        found = session(images)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), shape


def test_as_many_tokens_as_heads_are_not_taken_for_one_another(exported):
    """The last stage of nano has 12 heads, and 12 tokens of these images: OpenVINO's fused attention mixes them up."""
    model, path, _ = exported
    images = np.random.default_rng(0).standard_normal((1, 3, 96, 128), dtype=np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(open_session(path)(images) - expected).max() < 1e-5 * np.abs(expected).max()


def test_in_a_file_of_one_size_either_is_not_taken_for_one_another(tmp_path):
    """By a runtime that knows nothing of it, too: four heads and four tokens."""
    from nextvit.runtime.openvino_session import confused, core

    model = fill(nextvit.create_model("nextvit_nano@1,1,1x1,1,r0.25", num_classes=5))
    nextvit.export(model, tmp_path / "m.xml", image_size=64, dynamic=False)
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    read = core().read_model(tmp_path / "m.xml")
    found = core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert not confused(read)


def test_the_report_says_how_the_file_was_checked(exported):
    model, path, report = exported
    p = report.parity
    assert p.ok
    assert p.live
    assert p.top1_agreement == 100
    assert p.max_abs <= p.bound.relative * p.size
    assert p.mean_abs <= p.max_abs
    assert p.cosine > 0.99999
    assert {row.batch for row in p.rows} >= {1, 2, 5}
    assert len({(row.height, row.width) for row in p.rows}) == 2
    assert p.setup.precision == report.precision == "fp32"
    beside = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert beside == json.loads(json.dumps(report.to_dict()))
    assert report.bytes == sum(file.stat().st_size for file in parts(path))


def test_the_file_carries_its_metadata(exported):
    model, path, _ = exported
    predictor = nextvit.load(path)
    assert predictor.metadata.variant == model.variant.name
    assert predictor.metadata.preprocess == model.metadata.preprocess
    assert predictor.metadata.version == nextvit.__version__
    assert predictor.task == "classify"
    assert len(predictor.labels) == 1000


@pytest.mark.parametrize("ending", ENDINGS)
def test_static_export_fixes_the_size_and_leaves_the_model_as_it_was(ending, small_export):
    model, path, report = small_export(ending)
    assert report.parity.ok
    assert report.parity.live
    session = open_session(path)
    assert session.metadata.preprocess.image_size == 64
    assert session(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 4)
    with pytest.raises(Exception, match=r"(?i)dimension|shape|size"):
        session(np.zeros((2, 3, 96, 64), np.float32))
    images = [np.full((50, 60, 3), value, np.uint8) for value in (0, 128, 255)]
    one_by_one = [nextvit.load(path).predict([image])[0] for image in images]
    assert nextvit.load(path).predict(images) == one_by_one, "a fixed batch is the file's affair"
    assert model.training
    assert model.head.fc.weight.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_export(channels, tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", in_channels=channels, num_classes=3))
    assert nextvit.export(model, tmp_path / "m.onnx").parity.ok


@pytest.mark.parametrize("ending", [pytest.param(".onnx", marks=pytest.mark.slow), ".xml"])
def test_a_file_that_answers_otherwise_is_not_kept(ending, tmp_path, monkeypatch):
    """One weight is moved before writing, as a faulty converter would."""
    model = fill(nextvit.create_model("nextvit_nano", num_classes=4))
    honest = exporting.export_form

    def faulty(network, *, fixed):
        form = honest(network, fixed=fixed)
        form.head.fc.weight.data[0] *= 1.1
        return form

    path = tmp_path / f"m{ending}"
    path.write_bytes(b"an older export")
    monkeypatch.setattr(exporting, "export_form", faulty)
    with pytest.raises(ParityError, match="was not written: its outputs differ"):
        nextvit.export(model, path, image_size=64, dynamic=False)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"an older export"


STAGES = {"image_size": 64, "dynamic": False, "stages": True}


@pytest.mark.slow
def test_stages_are_those_of_the_model(tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=4))
    report = nextvit.export(model, tmp_path / "m.onnx", **STAGES)
    assert [stage.name for stage in report.stages] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "logits"]
    assert all(stage.relative < 1e-5 and stage.cosine > 0.99999 for stage in report.stages)


def test_stages_show_where_a_file_goes_wrong(tmp_path, monkeypatch):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=4))
    honest = exporting.export_form

    def faulty(network, *, fixed):
        form = honest(network, fixed=fixed)
        form.stages[2].blocks[0].mlp.fc1.weight.data *= 1.5
        return form

    monkeypatch.setattr(exporting, "export_form", faulty)
    with pytest.raises(ParityError, match="relative difference after each stage") as caught:
        nextvit.export(model, tmp_path / "bad.onnx", **STAGES)
    assert list(tmp_path.iterdir()) == []
    after = dict(re.findall(r"(stem|stage \d|logits) ([\d.e+-]+\d)", str(caught.value)))
    assert max(float(after[name]) for name in ("stem", "stage 1", "stage 2")) < 1e-5
    assert min(float(after[name]) for name in ("stage 3", "stage 4")) > 1e-4


@pytest.mark.fault("K4", "a flipped bit in .onnx, .xml, .bin: found")
@pytest.mark.parametrize("ending", ENDINGS)
def test_flipped_bits_and_missing_parts_are_found(ending, small_file, tmp_path):
    path = small_file(ending, tmp_path)
    for file in parts(path):
        good = file.read_bytes()
        for place in np.linspace(0, len(good) - 1, 25).astype(int):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 8)
            file.write_bytes(bad)
            with pytest.raises(UserError):
                nextvit.load(path)
        file.write_bytes(good[: len(good) // 2])
        with pytest.raises(UserError):
            nextvit.load(path)
        file.unlink()
        with pytest.raises(UserError):
            nextvit.load(path)
        file.write_bytes(good)
    nextvit.load(path)


def test_a_foreign_onnx_file_and_one_with_tensors_elsewhere_are_refused(small_file, tmp_path):
    import onnx

    from nextvit.files import OPEN_SEAL, close_seal

    model = onnx.load(small_file(".onnx", tmp_path))
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match="no nextvit metadata"):
        nextvit.load(tmp_path / "bare.onnx")
    notes = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**notes, "sha256": OPEN_SEAL})
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="secret.data", size_threshold=0)
    close_seal(tmp_path / "outside.onnx")
    with pytest.raises(UserError, match="keeps tensors in other files"):
        nextvit.load(tmp_path / "outside.onnx")


@pytest.mark.parametrize("kind", ["../x", "a/../../x", "absolute", "symlink", "hard link", "linked folder"])
def test_tensors_outside_the_file_are_refused_before_a_runtime_sees_them(kind, small_file, tmp_path):
    """However the other file is named or linked: its bytes must not come out as outputs."""
    import onnx

    from nextvit.files import OPEN_SEAL, close_seal

    folder, secret = tmp_path / "in", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(b"\x01\x02\x03\x04" * 100_000)
    location = {"../x": "../secret", "a/../../x": "a/../../secret", "absolute": str(secret)}.get(kind, "beside")
    if kind == "symlink":
        (folder / "beside").symlink_to(secret)
    elif kind == "hard link":
        os.link(secret, folder / "beside")
    elif kind == "linked folder":
        (folder / "linked").symlink_to(tmp_path)
        location = "linked/secret"
    model = onnx.load(small_file(".onnx", tmp_path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "400")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    notes = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**notes, "sha256": OPEN_SEAL})
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    close_seal(folder / "m.onnx")
    with pytest.raises(UserError, match="keeps tensors in other files"):
        nextvit.load(folder / "m.onnx")


@pytest.mark.parametrize(
    "fault",
    ["none", "huge", "wrong count", "no object", "extra entry", "size", "crop", "std", "classes", "precision", "task"],
)
def test_metadata_that_is_not_ours_is_refused(fault, small_file, tmp_path):
    import onnx

    from nextvit.files import OPEN_SEAL, close_seal

    model = onnx.load(small_file(".onnx", tmp_path))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    record = json.loads(notes["nextvit"])
    changed = {
        "none": None,
        "huge": json.dumps({**record, "labels": ["x" * 2_500_000] * 4}),
        "wrong count": json.dumps({**record, "labels": ["a", "b"]}),
        "no object": "[]",
        "extra entry": json.dumps({**record, "run": "this"}),
        "size": json.dumps({**record, "preprocess": {**record["preprocess"], "image_size": 10**7}}),
        "crop": json.dumps({**record, "preprocess": {**record["preprocess"], "crop": 1e-9}}),
        "std": json.dumps({**record, "preprocess": {**record["preprocess"], "std": [1e-300] * 3}}),
        "classes": json.dumps({**record, "num_classes": "x"}),
        "precision": json.dumps({**record, "precision": "fp99"}),
        "task": json.dumps({**record, "task": "evil"}),
    }[fault]
    notes["sha256"] = OPEN_SEAL
    del notes["nextvit"]
    onnx.helper.set_model_props(model, notes if changed is None else {**notes, "nextvit": changed})
    onnx.save(model, tmp_path / "m.onnx")
    close_seal(tmp_path / "m.onnx")
    done = nextvit_here("info", tmp_path / "m.onnx")
    assert (done.returncode, "metadata" in done.stderr) == (2, True), done.stderr
    assert len(done.stderr) < 600
    assert "Traceback" not in done.stderr


def test_metadata_with_another_number_of_classes_than_outputs_is_refused(small_file, tmp_path, garment_folder):
    import onnx

    from nextvit.files import OPEN_SEAL, close_seal

    model = onnx.load(small_file(".onnx", tmp_path))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    record = json.dumps({**json.loads(notes["nextvit"]), "num_classes": 2, "labels": ["a", "b"]})
    onnx.helper.set_model_props(model, {**notes, "nextvit": record, "sha256": OPEN_SEAL})
    onnx.save(model, tmp_path / "m.onnx")
    close_seal(tmp_path / "m.onnx")
    done = nextvit_here("predict", tmp_path / "m.onnx", sorted((garment_folder / "bag").iterdir())[0])
    assert (done.returncode, "gives 4 outputs" in done.stderr) == (2, True), done.stderr


def test_labels_full_of_markup_come_out_harmless(small_file, tmp_path, garment_folder):
    import onnx

    from nextvit.files import OPEN_SEAL, close_seal

    model = onnx.load(small_file(".onnx", tmp_path))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    labels = ["<script>alert(1)</script>", "\x1b[31mred", "=cmd()", "line\nbreak"]
    record = json.dumps({**json.loads(notes["nextvit"]), "labels": labels})
    onnx.helper.set_model_props(model, {**notes, "nextvit": record, "sha256": OPEN_SEAL})
    onnx.save(model, tmp_path / "m.onnx")
    close_seal(tmp_path / "m.onnx")
    image = sorted((garment_folder / "bag").iterdir())[0]
    shown = [nextvit_here("info", tmp_path / "m.onnx"), nextvit_here("predict", tmp_path / "m.onnx", image)]
    done = nextvit_here("predict", tmp_path / "m.onnx", image, "--output", tmp_path / "rows.csv")
    for out in (*(one.stdout + one.stderr for one in (*shown, done)), (tmp_path / "rows.csv").read_text()):
        assert "\x1b" not in out
        assert not re.search(r"(^|,)=cmd", out, re.MULTILINE)


@pytest.mark.parametrize("target", ["m.tflite", "m"])
def test_an_ending_that_is_no_format_is_refused_with_those_that_are(target, tmp_path):
    with pytest.raises(UserError, match=re.escape(".onnx (onnx), .xml (openvino)")):
        nextvit.export(nextvit.create_model("nextvit_nano"), tmp_path / target)


@pytest.mark.slow
def test_a_model_that_is_not_what_its_metadata_says_is_refused(tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=3))
    model.head.fc = torch.nn.Linear(512, 7)
    with pytest.raises(UserError, match="7 outputs and its metadata 3 classes"):
        nextvit.export(model, tmp_path / "m.onnx", image_size=64, dynamic=False)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match="not Linear"):
        nextvit.export(torch.nn.Linear(2, 2), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_format_and_the_output_must_agree(tmp_path):
    done = nextvit_here("export", "nextvit_nano", "--to", "onnx", "--output", tmp_path / "m.xml")
    assert (done.returncode, "--to onnx writes .onnx files" in done.stderr) == (2, True)
    (tmp_path / "folder.onnx").mkdir()
    done = nextvit_here("export", "nextvit_nano", "--to", "onnx", "--output", tmp_path / "folder.onnx")
    assert (done.returncode, "is a folder" in done.stderr) == (2, True)


def test_export_eval_and_predict_of_a_trained_run_agree(trained, garment_folder, tmp_path):
    """The command line: a checkpoint and both exported files give the same metrics and the same answers."""
    images = sorted((garment_folder / "bag").iterdir())[:3]
    results = []
    models = [trained / "model.safetensors", trained / "best.ckpt"]
    for to, ending in (("onnx", ".onnx"), ("openvino", ".xml")):
        done = nextvit_here("export", models[0], "--to", to, "--output", tmp_path / f"m{ending}", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["parity"]["ok"] is True
        models.append(tmp_path / f"m{ending}")
    for model in models:
        scored = nextvit_here("eval", model, garment_folder, "--json")
        assert scored.returncode == 0, scored.stderr
        answers = nextvit.load(model).predict([str(image) for image in images])
        results.append((json.loads(scored.stdout), answers))
    first = results[0]
    for scored, answers in results[1:]:
        assert (scored["top1"], scored["images"]) == (first[0]["top1"], first[0]["images"])
        assert scored["loss"] == pytest.approx(first[0]["loss"], abs=1e-4)
        for ours, theirs in zip(answers, first[1], strict=True):
            assert ours.labels == theirs.labels
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)


def test_a_predictor_takes_paths_pil_images_and_arrays_alike(trained, garment_folder):
    predictor = nextvit.load(trained / "model.safetensors")
    path = sorted((garment_folder / "sandal").iterdir())[0]
    from nextvit.data.images import read_image

    image = read_image(path)
    a, b, c, d = predictor.predict([path, str(path), image, np.asarray(image)])
    assert a == b == c == d
    assert sum(a.scores) == pytest.approx(1)
    assert predictor.predict([]) == []
    with pytest.raises(UserError, match="a list of images"):
        predictor.predict(str(path))
    batch = np.random.default_rng(0).standard_normal((2, 3, 32, 40), dtype=np.float32)
    assert np.array_equal(predictor.run(batch[:, ::-1]), predictor.run(batch[:, ::-1].copy()))
    with pytest.raises(UserError, match="1 x 1 pixels is too small"):
        predictor.run(batch[:, :, :1, :1])
    with pytest.raises(UserError, match=r"float32 of shape \(B, 3, H, W\)"):
        predictor.run(np.zeros((3, 32, 32), np.float32))


def test_precision_is_set_explicitly_or_refused(small_file, tmp_path):
    from nextvit.runtime.openvino_session import core

    small_file(".xml", tmp_path)
    assert nextvit.load(tmp_path / "m.xml").session.setup.precision == "fp32"
    able = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if able:
        assert nextvit.load(tmp_path / "m.xml", precision="bf16").session.setup.precision == "bf16"
    else:
        with pytest.raises(UserError, match="does not compute in bf16"):
            nextvit.load(tmp_path / "m.xml", precision="bf16")
    with pytest.raises(UserError, match="no device 'cuda'|not on 'cuda'"):
        nextvit.load(tmp_path / "m.xml", device="cuda")


@pytest.mark.slow
def test_a_missing_extra_is_named_with_its_install_line(tmp_path):
    blocked = tmp_path / "site"
    blocked.mkdir()
    (blocked / "onnxslim.py").write_text("raise ModuleNotFoundError(\"No module named 'onnxslim'\", name='onnxslim')")
    import os

    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    done = run("export", "nextvit_nano", "--to", "onnx", "--output", tmp_path / "m.onnx", env=environment)
    assert done.returncode == 2
    assert done.stderr == 'error: onnxslim is not installed; run: pip install "nextvit[onnx]"\n'
    shutil.rmtree(blocked)
    assert not list(tmp_path.iterdir())
