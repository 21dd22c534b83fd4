"""The command line: exit codes, one sentence, nothing but the result on standard output, every file accounted for."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvit.create import create_model
from nextvit.data.demo_images import garments
from nextvit.metadata import Preprocess
from nextvit.recipe import read_recipe
from nextvit.weights import read_weights, save_weights
from tests.conftest import fill, nextvit_here
from tests.detectors import lively

VERBS = ["info", "train", "eval", "predict", "export", "benchmark", "reproduce", "fit", "explain"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb):
    done = nextvit_here(verb, "--help")
    assert done.returncode == 0
    assert f"Example: nextvit {verb} " in done.stdout


def test_help_and_the_package_do_not_load_torch():
    script = "import sys, nextvit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_importing_the_package_costs_little_beside_torch():
    script = "import time, torch; s = time.perf_counter(); import nextvit; nextvit.create_model;"
    script += "print(time.perf_counter() - s)"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(2))
    assert seconds < 0.5


def test_the_core_needs_no_extra(tmp_path):
    """With every optional library blocked, a model is created, folded, saved, loaded and run on an image."""
    script = f"""
import sys
for name in "torchvision yaml pydantic matplotlib onnx onnxscript onnxslim onnxruntime openvino timm".split():
    sys.modules[name] = None
import nextvit
from nextvit.weights import save_weights
from PIL import Image
model = nextvit.create_model("nextvit_nano", num_classes=2)
nextvit.fold(model)
save_weights({str(tmp_path / "m.safetensors")!r}, model.state_dict(), model.metadata)
print(nextvit.load({str(tmp_path / "m.safetensors")!r}).predict([Image.new("RGB", (50, 40))])[0].labels)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert sorted(eval(done.stdout)) == ["0", "1"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nextvit_smol"], "did you mean nextvit_small"),
        (["info", "missing.safetensors"], "missing.safetensors"),
        (["eval", "missing.onnx", "demo"], "there is no file missing.onnx"),
        (["eval", "nextvit_nano", "missing"], "there is no folder missing"),
        (["eval", "nextvit_nano", "demo", "--weights", "nowhere.pth"], "cannot read nowhere.pth"),
        (["eval", "nextvit_nano", "demo"], "does not know"),
        (["train", "demo", "--model", "nextvit_smol", "--weights", "none"], "did you mean"),
        (["train", "demo", "--recipe", "nosuch"], "no recipe 'nosuch'"),
        (["train", "demo", "--device", "cuda"], "no device 'cuda'"),
        (["train", "demo", "--resume", "nowhere"], "no run folder"),
        (["train"], "DATA"),
        (["export", "nextvit_nano", "--to", "tflite"], "tflite"),
        (["predict", "nextvit_nano", "nowhere.jpg"], "could not be read"),
        (["nosuchverb"], "nosuchverb"),
        (["eval", "nextvit_nano", "demo", "--precision", "fp16"], "fp16"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = nextvit_here(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_verbs_alone_are_answered_with_their_help(arguments):
    done = nextvit_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: nextvit")
    assert "error:" not in done.stderr


def test_what_eval_is_to_write_with_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = nextvit_here("eval", "missing.onnx", "demo", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert 'pip install "nextvit[plots]"' in done.stderr


def test_debug_shows_the_traceback():
    done = nextvit_here("info", "nextvit_smol", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["info"], ["info", "nextvit_tiny"]])
def test_json_is_one_object_and_nothing_else(arguments):
    done = nextvit_here(*arguments, "--json")
    assert isinstance(json.loads(done.stdout), dict)


def test_info_of_a_checkpoint_tells_what_it_holds(trained):
    told = json.loads(nextvit_here("info", trained / "last.ckpt", "--json").stdout)
    assert (told["variant"], told["checkpoint"]["epochs_done"], told["image_size"]) == ("nextvit_nano", 2, 32)
    assert told["metadata"]["labels"] == ["bag", "sandal", "trouser"]
    recipes = {read_weights(trained / name).metadata.recipe for name in ("last.ckpt", "best.ckpt", "model.safetensors")}
    assert recipes == {read_recipe(str(trained / "recipe.yaml")).sha256}


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index, tile in enumerate(garments("val")["bag"][:5]):
        tile.save(folder / f"{index}.png")
    garments("val")["sandal"][0].save(folder / "deep" / "x.png")
    (folder / "bad.jpg").write_text("no image")
    odd = [b"\xff.png", b"new\nline.png", b"=cmd.png", "é😀.png".encode()]
    for name in odd:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            garments("val")["bag"][6].save(file, format="PNG")
    return folder


def test_predict_writes_a_row_for_each_file_once_in_order(trained, pictures, tmp_path):
    output = tmp_path / "answers.jsonl"
    done = nextvit_here(
        "predict", trained / "model.safetensors", pictures, pictures / "0.png", "gone.png", "--output", output
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = [os.fsencode(row["file"]) for row in rows]
    expected = [os.fsencode(p) for p in sorted(p for p in pictures.iterdir() if p.is_file())]
    assert found == [*expected, os.fsencode(pictures / "deep" / "x.png"), b"gone.png"]
    bad = [row for row in rows if "error" in row]
    assert [Path(row["file"]).name for row in bad] == ["bad.jpg", "gone.png"]
    for row in rows:
        if "error" not in row:
            assert sorted(row["labels"]) == ["bag", "sandal", "trouser"]
            assert row["scores"] == sorted(row["scores"], reverse=True)
            assert sum(row["scores"]) == pytest.approx(1, abs=1e-5)
    assert "2 of 12 files could not be read" in done.stderr


def test_predict_gives_each_file_the_answer_that_it_has_alone(trained, pictures, tmp_path):
    together = nextvit_here("predict", trained / "model.safetensors", pictures, "--batch-size", 4)
    alone = nextvit_here("predict", trained / "model.safetensors", pictures / "deep" / "x.png")
    row = next(r for r in map(json.loads, together.stdout.splitlines()) if r["file"].endswith("x.png"))
    single = json.loads(alone.stdout)
    assert row["labels"] == single["labels"]
    assert row["scores"] == pytest.approx(single["scores"], abs=1e-5)


def test_predict_writes_csv_that_a_spreadsheet_can_open_and_pictures(trained, pictures, tmp_path, monkeypatch):
    output = tmp_path / "answers.csv"
    drawn = tmp_path / "drawn"
    monkeypatch.chdir(pictures)
    model = trained / "model.safetensors"
    done = nextvit_here("predict", model, "--output", output, "--save-images", drawn, "--", "=cmd.png", "0.png")
    assert done.returncode == 0, done.stderr
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["'=cmd.png", "0.png"]
    assert all(float(row["score"]) > 0.3 for row in rows)
    assert len(list(drawn.glob("*.png"))) == 2
    assert Image.open(next(drawn.glob("0*.png"))).height > 28


def test_predict_strict_fails_when_a_file_does(trained, pictures, tmp_path):
    done = nextvit_here(
        "predict", trained / "model.safetensors", pictures, "--strict", "--output", tmp_path / "a.jsonl"
    )
    assert done.returncode == 2
    assert "1 of 11 files could not be read" in done.stderr


def test_predict_json_holds_the_answers(trained, pictures):
    for more in ([], ["--output", "-"]):
        told = json.loads(nextvit_here("predict", trained / "model.safetensors", pictures, "--json", *more).stdout)
        assert (told["files"], told["answered"], told["rejected"], len(told["answers"])) == (11, 10, 1, 11)


def test_random_weights_are_said_to_be_random(pictures):
    assert "random weights" in nextvit_here("predict", "nextvit_nano", pictures / "0.png").stderr


def test_predict_survives_a_reader_that_goes_away(trained, pictures):
    command = f"{sys.executable} -m nextvit predict {trained / 'model.safetensors'} {pictures} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["file"].endswith("0.png")
    assert "Traceback" not in done.stderr


@pytest.mark.fault("D4", "eval: N of M read; exit 2 without --allow-bad")
def test_eval_refuses_a_figure_for_a_part_unless_allowed(trained, garment_folder, tmp_path):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(garment_folder, folder)
    (folder / "bag" / "04.jpg").write_bytes(b"broken")
    done = nextvit_here("eval", trained / "model.safetensors", folder)
    assert done.returncode == 2
    assert "1 of 12 images cannot be read" in done.stderr
    allowed = nextvit_here("eval", trained / "model.safetensors", folder, "--allow-bad", "--json")
    assert allowed.returncode == 0
    told = json.loads(allowed.stdout)
    assert (told["images"], len(told["rejected"])) == (11, 1)


def test_eval_maps_classes_by_name(trained, garment_folder, tmp_path):
    """A folder with only the last of the model's classes scores that class, not the first."""
    import shutil

    shutil.copytree(garment_folder / "trouser", tmp_path / "val" / "trouser")
    told = json.loads(nextvit_here("eval", trained / "model.safetensors", tmp_path, "--json").stdout)
    assert told["per_class"]["trouser"] == told["top1"]
    assert told["per_class"]["bag"] is None
    (tmp_path / "val" / "zebra").mkdir()
    assert nextvit_here("eval", trained / "model.safetensors", tmp_path).returncode == 2


def test_a_second_run_of_the_same_name_gets_a_number(garment_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "clothes-nano").mkdir(parents=True)
    done = nextvit_here("train", garment_folder, "--epochs", 1, "--image-size", 32)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "clothes-nano.2" / "model.safetensors").exists()


def test_weights_are_not_ignored_where_they_do_not_belong(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"x")
    done = nextvit_here("predict", tmp_path / "m.onnx", tmp_path, "--weights", "in1k")
    assert (done.returncode, "--weights goes with a variant's name" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_signal_ends_the_demo_without_a_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "nextvit.demo", str(tmp_path / "demo")], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "to validate" in line:
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved; go on with: nextvit train demo --resume" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_leaves_the_rows_that_predict_has(number, code, trained, garment_folder, tmp_path):
    image = next((garment_folder / "bag").iterdir())
    for index in range(3000):
        (tmp_path / f"{index:04}.jpg").hardlink_to(image)
    output = tmp_path / "out" / "answers.jsonl"
    command = [sys.executable, "-m", "nextvit", "predict", str(trained / "model.safetensors"), str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--output", str(output), "--batch-size", "1"], stderr=subprocess.PIPE, text=True
    )
    partial = output.with_name("answers.jsonl.partial")
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"the rows so far are kept in {partial}" in errors
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(tmp_path / f"{index:04}.jpg") for index in range(len(rows))]
    assert 1 <= len(rows) < 3000
    assert not output.exists()


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_predict_goes_on_where_it_was_interrupted(ending, trained, pictures, tmp_path):
    command = ["predict", trained / "model.safetensors", pictures, "--batch-size", 2]
    whole, stopped = tmp_path / f"whole{ending}", tmp_path / f"stopped{ending}"
    assert nextvit_here(*command, "--output", whole).returncode == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    partial = stopped.with_name(f"{stopped.name}.partial")
    partial.write_bytes(b"".join(lines[:5]) + lines[5][: len(lines[5]) // 2])
    done = nextvit_here(*command, "--output", stopped, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"going on after {5 - (ending == '.csv')} of" in done.stderr
    assert stopped.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    partial.write_bytes(b"".join(lines[:5]))
    done = nextvit_here("predict", trained / "model.safetensors", pictures / "0.png", "--output", stopped, "--resume")
    assert (done.returncode, "rows of other files" in done.stderr) == (2, True)
    done = nextvit_here(*command, "--resume")
    assert (done.returncode, "goes on with an --output" in done.stderr) == (2, True)


def _png_bomb(path: Path, width: int, height: int) -> None:
    """A valid grey PNG of any size in a few kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.fixture
def segmenter(tmp_path):
    model = fill(create_model("nextvit_nano", task="segment", num_classes=2))
    small = Preprocess(image_size=32, crop=1.0, interpolation="bilinear", long_side=128)
    metadata = replace(model.metadata, labels=("a", "b"), preprocess=small)
    save_weights(tmp_path / "segmenter.safetensors", model.state_dict(), metadata)
    return tmp_path / "segmenter.safetensors"


@pytest.fixture
def detector(tmp_path):
    model = lively(classes=2, size=(64, 96))
    metadata = replace(model.metadata, labels=("a", "b"), preprocess=Preprocess(64, 1.0, "bilinear", long_side=96))
    save_weights(tmp_path / "detector.safetensors", model.state_dict(), metadata)
    return tmp_path / "detector.safetensors"


@pytest.mark.fault("P1", "files of every kind: a row for each, in order, an answer or a reason, in little memory")
@pytest.mark.parametrize(
    ("task", "count"),
    [
        pytest.param("classify", 1980, marks=pytest.mark.slow),
        ("segment", 120),
        pytest.param("detect", 120, marks=pytest.mark.slow),
    ],
)
def test_files_of_every_kind_are_accounted_for_in_little_memory(task, count, trained, request, tmp_path, found):
    """Bombs, broken and odd files, every mode, odd names, links and pipes: rows P1, P2 and P4 to P9 of the faults."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    tile = garments("val")["bag"][0].resize((200, 160)).convert("RGB")
    tile.save(folder / "good.jpg")
    whole = (folder / "good.jpg").read_bytes()
    _png_bomb(tmp_path / "169.png", 13_000, 13_000)
    _png_bomb(tmp_path / "1600.png", 40_000, 40_000)
    _png_bomb(tmp_path / "thin.png", 1, 60_000)
    bombs = [(tmp_path / name).read_bytes() for name in ("169.png", "1600.png", "thin.png")]
    modes = ("RGB", "L", "CMYK", "P", "LA", "RGBA", "1", "I;16")
    endings = {"RGB": ".webp", "L": ".bmp", "CMYK": ".tiff", "P": ".gif", "LA": ".png", "RGBA": ".png", "1": ".png"}
    good: set[str] = {"good.jpg"}
    for index in range(count):
        name = f"{index:04}"
        if index % 10 < 7:
            mode = modes[index % len(modes)]
            path = folder / f"{name}{endings.get(mode, '.png')}"
            image = (
                Image.fromarray(np.asarray(tile.convert("L"), np.uint16) * 257)
                if mode == "I;16"
                else tile.convert(mode)
            )
            image.save(path)
            good.add(path.name)
        else:
            kinds = [b"", whole[: len(whole) // 2], b"this is text", whole[:300] + os.urandom(200), *bombs]
            (folder / f"{name}.jpg").write_bytes(kinds[index % len(kinds)])
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo.jpg")
    for odd in (
        b"\xff.jpg",
        b"new\nline.jpg",
        b"-flag.jpg",
        b"=cmd.jpg",
        "\U0001f600.jpg".encode(),
        b"x" * 251 + b".jpg",
    ):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + odd)).write_bytes(whole)
        good.add(os.fsdecode(odd))
    (folder / "folder.jpg").mkdir()
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    output = tmp_path / "answers.jsonl"
    dense = {"segment": ("segmenter", "--save-masks"), "detect": ("detector", "--save-images")}
    fixture, flag = dense.get(task, (None, None))
    model = request.getfixturevalue(fixture) if fixture else trained / "model.safetensors"
    command = [sys.executable, "-m", "nextvit", "predict", str(model), str(folder)]
    if flag:
        command += [flag, str(tmp_path / "pictures")]
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--output", str(output)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    files = sorted(path for path in folder.iterdir() if not (path.is_dir() and not path.is_symlink()))
    assert sorted(row["file"] for row in rows) == sorted(map(str, files))
    assert {Path(row["file"]).name for row in rows if "error" not in row} == good
    peak = int(done.stderr.split()[-1]) * 1024
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"
    found(f"{task}: {len(rows)} rows, {len(good)} answers, {peak / 1e9:.2f} GB")
    if flag:
        answers = [(number, Path(row["file"])) for number, row in enumerate(rows, 1) if "error" not in row]
        assert len(list((tmp_path / "pictures").iterdir())) == len(good)
        for number, file in answers:
            (picture,) = (tmp_path / "pictures").glob(f"{number:06}-*")
            with Image.open(picture) as drawn:
                assert drawn.size == (200, 160), file
