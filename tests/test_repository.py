"""What holds for the tree as a whole: imports go one way, floors are kept, nothing is run that came with data."""

import ast
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "nextvit"
ROOMS = [  # the order of docs/architecture.md: a module imports what stands before it, or beside it in its own row
    ["errors", "extras", "files", "progress", "spec", "metadata", "devices", "class_names", "trust"],
    ["peers", "ablations"],
    ["backbone", "compared", "foreign"],
    ["heads"],
    ["segmenter", "detector"],
    ["networks"],
    ["processes"],
    ["weights"],
    ["create"],
    ["cost", "folding"],
    ["data"],
    ["metrics", "average_precision", "tasks"],
    ["evaluate"],
    ["recipe"],
    ["augmentation", "dense_augmentation", "scene_augmentation", "optimization", "teachers", "decide"],
    ["objective", "checkpoints"],
    ["learning", "journal", "profiling"],
    ["run"],
    ["train"],
    ["formats"],
    ["runtime"],
    ["exporters"],
    ["footprint", "pipeline"],
    ["benchmark"],
    ["candidates", "loading", "paper"],
    ["reproduce"],
    ["equal_latency", "fit", "accuracies"],
    ["describe", "results", "plots", "explain"],
    ["report", "tradeoff"],
    ["reproduced", "explained"],
    ["demo"],
    ["demo_segment", "demo_detect"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, row in enumerate(ROOMS) for name in row}


def tracked() -> list[Path]:
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY).decode().split("\0")
    return [REPOSITORY / name for name in names if name and (REPOSITORY / name).is_file()]


def imported(path: Path) -> set[str]:
    """Rooms of the package that a module imports, at its top or inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nextvit":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nextvit.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert {name for name in imported(path) if RANK[name] > RANK[room]} == set()


def test_the_architecture_page_names_every_room():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in SOURCE.rglob("*.py")} - {
        "__init__",
        "__main__",
    }
    assert [room for room in sorted(rooms) if f"`{room}`" not in page and f"`{room}." not in page] == []
    assert rooms | {"__main__"} == set(RANK)


def test_security_floors_are_declared_and_installed():
    declared = re.findall(r'"([^"]+)"', (REPOSITORY / "pyproject.toml").read_text())
    for name, floor in (("torch", "2.10"), ("pillow", "12.3"), ("onnx", "1.21")):
        assert f"{name}>={floor}" in declared
        assert tuple(map(int, re.findall(r"\d+", version(name))[:2])) >= tuple(map(int, floor.split(".")))


def test_versions_are_pinned_without_addresses():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+( ; .*)?", line) for line in lines)
    assert not [line for line in lines if "://" in line]


def test_no_code_runs_what_came_with_data():
    """No eval, exec, shell, pickle or unsafe loader in the package; torch.load in the one reader, weights only."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads"), path
                assert name != "yaml.load" or flags.get("Loader") == "yaml.BaseLoader", (
                    path
                )  # it makes nothing but text
                assert flags.get("shell") != "True", path
                if name == "torch.load":
                    assert path.name == "weights.py"
                    assert flags["weights_only"] == "True"


def test_nothing_tracked_names_a_place_or_a_registry():
    temporary = REPOSITORY.parent == Path(tempfile.gettempdir())  # tests may name that
    where = f"{REPOSITORY if temporary else REPOSITORY.parent}/"
    for path in tracked():
        if path.suffix in (".png", ".jpg"):
            continue
        text = path.read_text()
        assert where not in text or len(where) < 4, path
        assert not re.search(r"https?://[\w.-]+/(simple|packages|pool)/", text), path


def test_the_package_ships_what_it_needs(tmp_path):
    """A wheel, built and read: the images with their licences, the recipes, the labels, the type marker."""
    import zipfile

    subprocess.run(
        [sys.executable, "-c", "import hatchling.build, sys; hatchling.build.build_wheel(sys.argv[1])", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for wanted in (
        "nextvit/py.typed",
        "nextvit/recipes/demo.yaml",
        "nextvit/data/imagenet_labels.txt",
        "nextvit/data/imagenet_wordnet_ids.txt",
        "nextvit/data/demo/garments/LICENSE",
        "nextvit/data/demo/README.md",
        "nextvit/data/demo/garments/val/9_ankle-boot.png",
        "nextvit/data/demo/backgrounds/train/coffee.jpg",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/NOTICE") for name in names)
