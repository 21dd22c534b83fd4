"""Metrics beside independent ones: brute force, and torchmetrics."""

import numpy as np
import pytest
import torch

from nextvit.data.scenes import annotation_map, compose
from nextvit.metrics import PixelConfusion

IGNORED = 255


def random_pairs(classes, count=4):
    """Answers that are right for some pixels, and labels of which some are ignored and some classes absent."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = rng.integers(0, classes - 1, (23, 31)).astype(np.uint8)
        answers = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, classes - 1, labels.shape))
        labels[rng.random(labels.shape) < 0.2] = IGNORED
        yield answers, labels


def real_pairs():
    """Scenes, and the same moved by a few pixels."""
    for index in range(3):
        labels = annotation_map(compose("val", index)) - 1
        yield np.roll(labels, (3, -2), (0, 1)), labels


PAIRS = [(5, random_pairs(5)), (150, random_pairs(150)), (6, real_pairs())]


@pytest.mark.parametrize(("classes", "pairs"), [(c, list(p)) for c, p in PAIRS], ids=["few", "many", "scenes"])
def test_mean_iou_is_that_of_torchmetrics_and_of_counting(classes, pairs):
    from torchmetrics import JaccardIndex

    found = PixelConfusion(classes)
    theirs = JaccardIndex(task="multiclass", num_classes=classes, ignore_index=IGNORED, average="none")
    for answers, labels in pairs:
        found.update(answers, labels)
        theirs.update(torch.from_numpy(answers.astype(np.int64))[None], torch.from_numpy(labels.astype(np.int64))[None])
    ours = theirs.compute().numpy() * 100
    a, b = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    a, b = a[b != IGNORED], b[b != IGNORED]
    for number, iou in enumerate(found.ious):
        either = int(((a == number) | (b == number)).sum())
        if either == 0:
            assert iou is None
            continue
        assert iou == pytest.approx(100 * int(((a == number) & (b == number)).sum()) / either, abs=1e-9)
        assert iou == pytest.approx(ours[number], abs=1e-4)
    assert found.miou == pytest.approx(np.mean([iou for iou in found.ious if iou is not None]), abs=1e-9)
    assert found.accuracy == pytest.approx(100 * (a == b).mean(), abs=1e-9)
    assert found.pixels == len(a)


def test_a_class_that_is_nowhere_is_in_no_mean():
    metric = PixelConfusion(3)
    metric.update(np.array([[0, 1]]), np.array([[0, 0]]))
    assert metric.ious == [50.0, 0.0, None]
    assert metric.miou == 25.0


def eroded(mask, width):
    """By squares, pixel by pixel; what lies outside the image is outside the mask."""
    grown = np.pad(mask, width)
    windows = np.lib.stride_tricks.sliding_window_view(grown, (2 * width + 1,) * 2)
    return windows.all((2, 3))


@pytest.mark.parametrize("pairs", [list(random_pairs(4)), list(real_pairs())], ids=["random", "scenes"])
def test_boundary_iou_is_that_of_erosion(pairs):
    classes = 6
    metric, both, either = PixelConfusion(classes, boundary=True), np.zeros(classes), np.zeros(classes)
    for answers, labels in pairs:
        metric.update(answers, labels)
        width = max(1, round(0.02 * np.sqrt(labels.shape[0] ** 2 + labels.shape[1] ** 2)))
        for number in range(classes):
            masks = [(values == number) & (labels != IGNORED) for values in (answers, labels)]
            edges = [mask & ~eroded(mask, width) for mask in masks]
            both[number] += (edges[0] & edges[1]).sum()
            either[number] += (edges[0] | edges[1]).sum()
    shares = 100 * both[either > 0] / either[either > 0]
    assert metric.boundary_miou == pytest.approx(shares.mean(), abs=1e-9)


def test_the_sums_of_processes_are_those_of_one():
    pairs = list(random_pairs(5))
    whole, parts = PixelConfusion(5, boundary=True), [PixelConfusion(5, boundary=True) for _ in range(2)]
    for index, pair in enumerate(pairs):
        whole.update(*pair)
        parts[index % 2].update(*pair)
    sums = iter([parts[0].confusion + parts[1].confusion, parts[0].edges + parts[1].edges])
    parts[0].merge(lambda array: next(sums))
    assert (parts[0].miou, parts[0].boundary_miou) == (whole.miou, whole.boundary_miou)
