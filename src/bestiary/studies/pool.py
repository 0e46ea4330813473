"""Worker processes on this machine: each runs one job at a time on its share of the cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from bestiary.errors import BestiaryError


class Pool:
    """Processes with one thread each; `results` yields (job, result) as jobs finish, also of jobs added meanwhile.

    A job is any picklable value; `work` a module-level function of it. An interrupt (Ctrl-C) reaches the jobs, which
    save what they have, and is raised here once they have stopped.
    """

    def __init__(self, work: Callable[[Any], Any], workers: int):
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.work, self.workers = work, workers
        self.executor = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(threads,))
        self.running: dict[Future, Any] = {}

    def add(self, job: Any) -> None:
        """Queue a job."""
        try:
            self.running[self.executor.submit(self.work, job)] = job
        except BrokenProcessPool as error:
            raise _killed() from error

    def results(self, tick: Callable[[], None], seconds: float = 0.5) -> Iterator[tuple[Any, Any]]:
        """Finished jobs and what they returned, until none is left; calls `tick` while waiting."""
        try:
            while self.running:
                done, _ = wait(self.running, timeout=seconds, return_when=FIRST_COMPLETED)
                tick()
                for future in done:
                    job = self.running.pop(future)
                    yield job, future.result()
        except BrokenProcessPool as error:
            raise _killed() from error
        finally:
            self.close()

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        self.executor.shutdown(wait=True, cancel_futures=True)


def _killed() -> BestiaryError:
    return BestiaryError("a worker process was killed (out of memory?); run the same command to go on")


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves, too
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker that outlives a killed parent would wait for ever, and write into runs that are being resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
