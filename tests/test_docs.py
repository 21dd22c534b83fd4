"""Every command and every piece of Python in the README and the docs runs as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit import create_model
from nextvit.data.demo_images import garments
from nextvit.weights import save_weights
from tests.conftest import REPOSITORY, nextvit_here
from tests.test_objects import voc

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
KINDS = ("shell", "slow shell", "python", "slow python", "hub", "make", "install", "benchmark")
BLOCK = re.compile(r"(?:<!-- test: ([\w ]+) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, _, text in BLOCK.findall(page.read_text()) if kind in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder as the pages assume it: the README's first run, a photograph, a few folders."""
    folder = tmp_path_factory.mktemp("docs")
    garments("val")["bag"][0].save(folder / "photo.png")
    for name, labels in (("photos", ["."]), ("imagenet/val", ["0"]), ("flowers", ["bag", "sandal", "trouser"])):
        for label in labels:
            (folder / name / label).mkdir(parents=True)
            for index in range(20 if name == "flowers" else 3):
                tile = garments("train")[label if name == "flowers" else "bag"][index]
                tile.resize((60, 60)).save(folder / name / label / f"{index}.png")
    (folder / "VOCdevkit").mkdir()
    voc(folder / "VOCdevkit" / "VOC2012")
    run(folder, *blocks(PAGES[0], "shell"))
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    """Those of a row of the paper's tables, for garments."""
    (folder / "weights").mkdir()
    model = create_model("nextvit_small", num_classes=3)
    labelled = replace(model.metadata, labels=("bag", "sandal", "trouser"))
    save_weights(folder / "weights" / "nextvit_small.safetensors", model.state_dict(), labelled)


def run_here(folder: Path, *texts: str) -> None:
    """The lines of shell blocks in this process, where they are commands of ours alone; others as `run` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in "".join(texts).splitlines():
            program, *arguments = shlex.split(line)
            if program != "nextvit" or set(arguments) & {"|", ">", "&&"}:
                run(folder, line)
                continue
            done = nextvit_here(*arguments)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


def run(folder: Path, *texts: str) -> None:
    """The lines of shell blocks, each in a shell of its own, as a reader would run them."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in "".join(texts).splitlines():
        done = subprocess.run(
            line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def run_python(folder: Path, *texts: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for text in texts:
            exec(compile(text, "a page", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_with_a_command_is_marked_to_be_tested(page):
    for kind, language, text in BLOCK.findall(page.read_text()):
        if re.search(r"^([A-Z_]+=\S+ )*(nextvit|make|pip|python) ", text, re.MULTILINE) or language == "python":
            assert kind in KINDS, text


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_the_commands_of_a_page_run(page, folder):
    """Those of the README have run in shells of their own."""
    run_here(folder, *blocks(page, "shell"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_slow_commands_of_a_page_run(page, folder, weights):
    """After the others of the page, whose files they may need."""
    slow = blocks(page, "slow shell")
    if slow and page != PAGES[0]:
        run(folder, *blocks(page, "shell"))
    run(folder, *slow)
    run_python(folder, *blocks(page, "slow python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, folder):
    run_python(folder, *blocks(page, "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_that_need_the_hub_ask_for_it_and_for_nothing_else(page, folder, monkeypatch):
    """Without a network they end with the sentence about the hub, so their flags and data are right."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(folder)
    for line in "".join(blocks(page, "hub")).splitlines():
        done = nextvit_here(*shlex.split(line)[1:])
        assert done.returncode == 2
        assert re.search("cannot get timm/nextvit_small.* from the hub", done.stderr), done.stderr


QUICK = {  # flags with which a benchmark takes a minute: as it stands it takes many on a quiet machine
    "cpu.py": "--model nextvit_nano --rounds 8 --output {}",
    "eager_vs_timm.py": "--rounds 8",
    "loader_vs_timm.py": "--rounds 2",
    "segmentation.py": "--model nextvit_nano --rounds 6",
    "detection.py": "--model nextvit_nano --rounds 8",
    "peers.py": "--models nextvit_nano --seeds 0 --epochs 1 --output {}/peers.csv",
    "peers_detect.py": "--models nextvit_nano --seeds 0 --epochs 1 --steps 4 --scenes 60 --output {}/peers.csv",
    "fit.py": "--count 1 --frames nextvit_nano --sizes 64 --device-runtime torch --rounds 8 --output {}/fit.csv",
    "finetune.py": "--seeds 0 --pretraining-epochs 1 --epochs 2 --output {}/finetune.csv",
}
SAID = {
    "cpu.py": "resnet18",
    "eager_vs_timm.py": "training step",
    "loader_vs_timm.py": "times timm's",
    "segmentation.py": "training step",
    "detection.py": "torchvision ResNet101",
    "peers_detect.py": "box_ap50",
    "fit.py": "of 1 predictions are within 10%",
}


def benchmark_commands():
    for page in PAGES:
        for line in "".join(blocks(page, "benchmark")).splitlines():
            yield pytest.param(line[line.index("benchmarks/") :], id=f"{page.name}-{shlex.split(line)[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize("command", benchmark_commands())
def test_the_benchmarks_of_a_page_run(command, tmp_path):
    script = Path(shlex.split(command)[0]).name
    quick = QUICK[script].format(tmp_path)
    line = [sys.executable, *shlex.split(f"{command} {quick}")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert SAID.get(script, "top1") in done.stdout
    suffixes = {file.suffix for file in tmp_path.iterdir()}
    assert suffixes == ({".csv", ".png"} if script == "cpu.py" else {".csv"} if "{}" in QUICK[script] else set())


def test_make_targets_in_the_pages_exist():
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    text = "".join(page.read_text() for page in [*PAGES, REPOSITORY / "CONTRIBUTING.md"])
    named = set(re.findall(r"(?:`|```\n)make ([\w-]+)", text))
    assert {"demo", "test", "test-all", "lint", "format"} <= named
    assert named <= set(targets)


def test_every_key_of_a_recipe_is_explained():
    from nextvit.recipe import Recipe, flat, to_dict

    page = (REPOSITORY / "docs" / "train.md").read_text()
    assert [key for key in flat(to_dict(Recipe())) if f"`{key}`" not in page] == []


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The job of `make demo`: its run folder and what it printed."""
    run = tmp_path_factory.mktemp("demo") / "classes"
    done = subprocess.run(
        [sys.executable, "-m", "nextvit.demo", str(run)], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def insist_on_a_whole_page(run: Path, figure: str) -> None:
    page = (run / "report.html").read_text()
    assert figure in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs nothing but itself"


@pytest.mark.slow
def test_the_demo_runs_and_passes_its_gate(demo):
    """Its figures are those of the report."""
    run, told = demo
    top1 = float(re.search(r"held-out top-1: nextvit_nano ([\d.]+) %", told)[1])
    assert top1 >= 87
    insist_on_a_whole_page(run, f"{top1:.1f} %")
    assert {p.name for p in (run / "plots").glob("*.png")} >= {
        "curves.png",
        "confusion-test.png",
        "samples.png",
        "latency.png",
    }


@pytest.mark.slow
def test_the_demo_of_segmentation_runs_and_passes_its_gate(demo, tmp_path):
    """The job of `make demo-segment`."""
    command = [sys.executable, "-m", "nextvit.demo_segment", str(demo[0] / "model.safetensors")]
    done = subprocess.run([*command, str(tmp_path / "scenes")], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    miou = float(re.search(r"mIoU of nextvit_nano with Semantic FPN: ([\d.]+) %", done.stdout)[1])
    assert miou >= 40
    insist_on_a_whole_page(tmp_path / "scenes", f"{miou:.1f} %")


@pytest.mark.slow
def test_the_demo_of_detection_runs_and_passes_its_gate(demo, tmp_path):
    """The job of `make demo-detect`."""
    command = [sys.executable, "-m", "nextvit.demo_detect", str(demo[0] / "model.safetensors")]
    done = subprocess.run([*command, str(tmp_path / "objects")], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    ap50 = float(re.search(r"Mask R-CNN: box AP [\d.]+, AP50 ([\d.]+)", done.stdout)[1])
    assert ap50 >= 45
    insist_on_a_whole_page(tmp_path / "objects", f"AP50 {ap50:.1f} %")
