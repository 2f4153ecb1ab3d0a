"""Making what is kept in files: by one process at a time, which has others help."""

import collections
import concurrent.futures
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from absl import logging

T = TypeVar("T")

# Results a helper process may be ahead of the one that takes them.
_AHEAD = 4


def found_or_made(file: pathlib.Path, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What ``find`` finds of a file, or else what ``make`` makes.

    Of several processes that miss the file at the same time one makes it; the others wait and
    find it. The lock is the kernel's, on ``<file>.lock``: it ends with the process that holds it,
    however that ends.

    Args:
        file: what is to be there; its folder is made.
        find: looks for the file; None if it is absent or holds something else.
        make: makes the file and returns what ``find`` would.

    Raises:
        RuntimeError: this is a helper of the process that makes the file, so that each would wait
            for the other: a script without a main guard, run again by its helpers.
    """
    found = find()
    if found is not None:
        return found
    with _only_maker(file):
        found = find()
        return make() if found is None else found


def in_order(
    function: Callable[..., T], arguments: Iterable[tuple[object, ...]], workers: int
) -> Iterator[T]:
    """``function`` of each tuple of arguments, in their order.

    Where a process is killed, as the kernel does when memory runs out, a warning says so and this
    process does what is left.

    Args:
        function: of a module, so that another process finds it.
        arguments: picklable, if there are workers.
        workers: processes to work in; 0 for this one.
    """
    if workers == 0:
        yield from (function(*some) for some in arguments)
        return
    # Spawned, since a forked copy of a process that runs JAX may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        arguments = iter(arguments)
        started: collections.deque[tuple[object, ...]] = collections.deque()
        jobs: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            while True:
                # Results may be large: few are made ahead, and each is let go of.
                for some in itertools.islice(arguments, _AHEAD * workers - len(jobs)):
                    started.append(some)
                    jobs.append(pool.submit(function, *some))
                if not jobs:
                    break
                yield jobs.popleft().result()
                started.popleft()
        except BrokenProcessPool:
            logging.warning(
                "one of %d helper processes (data.cache_workers) was killed, perhaps for want of "
                "memory; this process goes on alone, more slowly",
                workers,
            )
        finally:
            pool.shutdown(cancel_futures=True)
    yield from (function(*some) for some in itertools.chain(started, arguments))


@contextlib.contextmanager
def _only_maker(file: pathlib.Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f"{file.name}.lock")
    while True:
        with lock.open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                maker = stream.read()
                is_helper = multiprocessing.current_process().name != "MainProcess"
                if is_helper and maker == str(os.getppid()):
                    raise RuntimeError(
                        "a helper process (data.cache_workers) runs the main script again; put the "
                        'script\'s own calls under `if __name__ == "__main__":`'
                    ) from None
                logging.info("waiting for process %s, which makes %s", maker, file)
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream.fileno(), lock):
                continue  # locked what the last maker has removed meanwhile
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
