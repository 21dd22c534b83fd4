"""The search for a depth: on latencies that are known, with steps finer and coarser than the tolerance, and noise."""

import random

import pytest

from nextvit.ablations import ABLATIONS
from nextvit.equal_latency import TOLERANCE, equal_latency

SEARCHED = [a for a in ABLATIONS if a.reference]


def device(fixed: float, block: float, second: float, noise: float = 0.0):
    """Latencies relative to a reference: of all else, of a block of stage 3 and of a block of stage 2."""
    source = random.Random(0)
    return lambda third, more: (fixed + third * block + more * second) * (1 + source.uniform(-noise, noise))


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize("start", [1, 6, 40])
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
    found = equal_latency(device(1.4, 0.05, 0.05), SEARCHED[0].can_have, 10)
    assert not found.ok
    assert found.third == 1
    assert found.tried <= 14


def test_each_depth_is_measured_once():
    asked = []
    equal_latency(lambda n, m: asked.append((n, m)) or 0.45 + 0.13 * n + 0.04 * m, SEARCHED[0].can_have, 12)
    assert len(asked) == len(set(asked))
