"""Shared by the tests: networks whose outputs depend on their input, and small folders of real images."""

import contextlib
import functools
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvit import create_model, export
from nextvit.cli import main
from nextvit.data.demo_images import garments
from nextvit.exporters.export import ExportReport
from nextvit.files import parts

FAULTS: list[tuple[str, str, str, str]] = []  # id, expected, found, outcome
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Derived files of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


def uniform(key: int, count: int) -> np.ndarray:
    """The generator of the check values: a hash of key and index in 32-bit arithmetic -> float64 in [-0.5, 0.5)."""
    h = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(key * 97 % 2**32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    h *= np.uint32(3266489917)
    h ^= h >> np.uint32(16)
    return h.astype(np.float64) / 2**32 - 0.5


def fill(model: torch.nn.Module, first_key: int = 0) -> torch.nn.Module:
    """Give every entry of the state dict a value that depends on its place alone; the outputs then vary with the input.

    Fresh weights would not do: their outputs hardly depend on the image, and every comparison of them would pass.
    """
    for key, (name, entry) in enumerate(model.state_dict().items(), first_key):
        if name.endswith("num_batches_tracked"):
            continue
        u = uniform(key, entry.numel()).reshape(entry.shape)
        if name.endswith("running_mean"):
            value = 0.2 * u
        elif name.endswith("running_var"):
            value = 1 + u
        elif name.endswith("bias"):
            value = 0.2 * u
        elif entry.ndim == 1:
            value = 1 + 0.5 * u
        else:
            value = 0.7 * np.sqrt(12) * u / np.sqrt(entry[0].numel())
        entry.copy_(torch.from_numpy(value).float())
    return model.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to how much the expected outputs vary over the batch and the classes."""
    return float((found - expected).abs().max() / expected.std())


@pytest.fixture(scope="session")
def garment_folder(tmp_path_factory) -> Path:
    """A single folder of 3 classes with 20 images each, as a user might have it."""
    folder = tmp_path_factory.mktemp("own") / "clothes"
    for label in ("bag", "sandal", "trouser"):
        (folder / label).mkdir(parents=True)
        for index, tile in enumerate(garments("train")[label][:20]):
            tile.resize((40, 36)).convert("RGB").save(folder / label / f"{index:02}.jpg")
    return folder


@pytest.fixture(scope="session")
def trained(garment_folder, tmp_path_factory) -> Path:
    """The run folder of a short training on those images."""
    run = tmp_path_factory.mktemp("runs") / "short"
    done = nextvit_here("train", garment_folder, "--epochs", 2, "--image-size", 32, "--output", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def small_export(tmp_path_factory) -> Callable[[str], tuple[torch.nn.Module, Path, ExportReport]]:
    """A network that is written once a format, its file and the report: nano, four classes, 64 pixels, fixed.

    It is exported from training, in float64.
    """

    @functools.cache
    def written(ending: str) -> tuple[torch.nn.Module, Path, ExportReport]:
        path = tmp_path_factory.mktemp("small") / f"m{ending}"
        model = fill(create_model("nextvit_nano", num_classes=4)).double().train()
        return model, path, export(model, path, image_size=64, dynamic=False)

    return written


@pytest.fixture(scope="session")
def small_file(small_export) -> Callable[[str, Path], Path]:
    """Copies its file into a folder."""

    def copied(ending: str, folder: Path) -> Path:
        _, path, _ = small_export(ending)
        for file in parts(path):
            shutil.copy(file, folder)
        return folder / path.name

    return copied


def nextvit(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "nextvit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def nextvit_here(*arguments: object) -> subprocess.CompletedProcess:
    """The same within this process: for what is over so soon that a start would be most of the time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def found(request):
    """Record what a row of faults came to, for the table of `make faults`."""

    def record(text: str) -> None:
        request.node.user_properties.append(("found", text))

    return record


def pytest_configure():
    # What a shell starts in the background ignores SIGINT and hands that down; the tests send it to their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = (  # files of tests, the longest first: started last, one of them would keep one process busy and the other idle
    "test_docs", "test_faults", "test_export", "test_export_detect", "test_formats", "test_train_detect",
    "test_export_segment", "test_detector", "test_train", "test_precisions", "test_cli", "test_accuracies",
    "test_train_segment", "test_fit", "test_reproduce", "test_peers", "test_benchmark", "test_processes",
    "test_preprocessing", "test_detect", "test_weights", "test_segmenter", "test_foreign", "test_backbone",
    "test_explain",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))  # stable


def pytest_runtest_setup(item):
    for marker in item.iter_markers("fault"):
        item.user_properties.append(("fault", list(marker.args)))


def pytest_runtest_logreport(report):
    properties = dict(report.user_properties)
    if "fault" in properties and (report.when == "call" or report.outcome != "passed"):
        row, expected = properties["fault"]
        FAULTS.append((row, expected, properties.get("found", ""), report.outcome))


def pytest_terminal_summary(terminalreporter, config):
    if "fault" not in config.option.markexpr:
        return
    for row, expected, what, outcome in sorted(FAULTS, key=lambda f: (f[0][0], int(f[0][1:].split(",")[0]))):
        what = what or ("that, by every assertion of its test" if outcome == "passed" else "see the failure above")
        terminalreporter.write_line(f"{row:6} {outcome:8} expected: {expected}")
        terminalreporter.write_line(f"{'':15} found:    {what}")
