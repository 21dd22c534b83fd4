"""Everything drawn at random about data is a function of numbers: seed, epoch, and the image's index or the step.

Never of a worker, of the number of processes, or of what ran before. So a run can be left and resumed anywhere.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators start from these numbers inside, and are as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator(*numbers: int) -> np.random.Generator:
    """A generator of one's own that starts from these numbers."""
    return np.random.default_rng(np.random.SeedSequence(numbers))


def word(*numbers: int) -> int:
    """A number of 63 bits made of these, to seed a torch generator with."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
