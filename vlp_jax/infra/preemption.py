"""Leaving a run in order: signals become a flag, and every outcome has its exit code."""

import contextlib
import enum
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitCode(enum.IntEnum):
    """How a run ended, for scripts and schedulers.

    Attributes:
        OK: trained to the end of its budget.
        FAILED: an uncaught error; the traceback says which (Python's own code).
        CHOICE_FALLS: what a search has chosen does not stand on new data (``tools.skip_check``);
            nothing has failed.
        BAD_INPUT: the config or the data cannot work; the message names the key or the file
            (``EX_USAGE`` of sysexits.h). Starting again does not help.
        TOO_MANY_BAD_UPDATES: losses or gradients were not finite too often; the message names the
            last good checkpoint (``EX_DATAERR``).
        TOO_MANY_BAD_EXAMPLES: more records were damaged than the config allows (``EX_NOINPUT``).
        DAMAGED_CHECKPOINTS: there are checkpoints, and none can be read (``EX_IOERR``).
        PREEMPTED: asked to stop by a signal, and saved; start it again to resume
            (``EX_TEMPFAIL``).
    """

    OK = 0
    FAILED = 1
    CHOICE_FALLS = 3
    BAD_INPUT = 64
    TOO_MANY_BAD_UPDATES = 65
    TOO_MANY_BAD_EXAMPLES = 66
    DAMAGED_CHECKPOINTS = 74
    PREEMPTED = 75


class Interrupted(BaseException):
    """A signal has cut short what ran within ``PreemptionGuard.interrupting``.

    No ``Exception``, as KeyboardInterrupt is none: nobody means to catch it by accident.
    """


class PreemptionGuard:
    """Turns the first SIGTERM or SIGINT into a flag that the training loop polls.

    The old handlers come back with that first signal, so a second one ends the process at once (or
    raises KeyboardInterrupt), for those who cannot wait for the save; and on leaving the context.

    With several processes, agree before acting on it: signals reach them at different steps.

    Example::

        with PreemptionGuard() as guard:
            for step in steps:
                ...
                if guard.requested:
                    save(); sys.exit(ExitCode.PREEMPTED)
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._interrupting = False
        self._old_handlers: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested.is_set()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal does not wait: it raises ``Interrupted``, wherever the work is.

        For long work that changes nothing and that a later run does again, such as an evaluation.
        It must not be collective: the other processes would wait for this one.
        """
        self._interrupting = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()
        self._restore()
        logger.warning(
            "%s: saving, then leaving with code %d; a second signal ends at once",
            signal.Signals(number).name,
            ExitCode.PREEMPTED,
        )
        if self._interrupting:
            raise Interrupted

    def _restore(self) -> None:
        # Taken first: another signal may come, and call this, while handlers are put back.
        old, self._old_handlers = self._old_handlers, {}
        for number, handler in old.items():
            # None: a handler that was not set from Python; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
