"""What ends a command early, and the exit code that each has."""

import sys
import traceback
from collections.abc import Callable, Sequence

TOLD = 5  # offenders that a message names


class UserError(ValueError):
    """Bad input: an argument, a file, or data that does not fit. A sentence that says what was wrong and what to do."""


class MissingExtra(UserError, ImportError):
    """An optional library is not installed; the message names the `pip install` line that brings it."""


class NotConverted(UserError):
    """A converter cannot take a model as it was given: perhaps with other sizes left open it can."""


class NotHere(UserError):
    """This file, runtime or machine does not have the precision or the hint that was asked for."""


class Diverged(UserError):
    """Training produced a number that is not finite."""


class OutOfMemory(RuntimeError):
    """The machine's or the GPU's memory is too short for what was asked. The command line exits with 1."""


class DiskFull(RuntimeError):
    """There is no room for a file. What was there before is whole. The command line exits with 1."""


class LoaderDied(RuntimeError):
    """A process that loads images was killed. The command line exits with 1."""


class ParityError(RuntimeError):
    """An exported file does not answer as its model does. Not the user's mistake: the command line exits with 1."""


class AccuracyError(RuntimeError):
    """An int8 file loses more accuracy than was allowed. The command line exits with 1."""


class Interrupted(Exception):
    """A signal asked for an end; what there was to save is saved. Carries the signal's number."""

    def __init__(self, number: int, next_step: str = ""):
        super().__init__(next_step or "interrupted.")
        self.number = number


def exit_code(run: Callable[[], object], *, debug: bool) -> int:
    """Run a command: 0 done, 2 the user can mend it, 128 + N after signal N, 1 anything else; errors in one sentence.

    debug: show the traceback too. SystemExit passes.
    """
    try:
        code = run()
        return code if isinstance(code, int) else 0
    except Exception as error:  # whatever a library raised: a person gets a sentence, not a traceback
        if debug:
            traceback.print_exc()
        if isinstance(error, Interrupted):
            print(error, file=sys.stderr)
            return 128 + error.number
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            return 2
        text = str(error).strip().splitlines() or [""]
        print(f"error: {type(error).__name__}: {text[0]} (--debug shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


def short_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory that could not be had, whichever library says it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def first_few(told: Sequence[str]) -> str:
    """Phrases on what was wrong as one, and how many more there are."""
    more = f"; and {len(told) - TOLD} more" if len(told) > TOLD else ""
    return "; ".join(phrase.rstrip(".") for phrase in told[:TOLD]) + more
