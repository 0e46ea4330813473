"""Worker processes: every job is done once, and a death among them is one clear error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bestiary.errors import BestiaryError, UsageError
from bestiary.studies.pool import Pool

KILLED = "a worker process was killed .* run the same command to go on"


def work(job: object) -> object:
    """What the tests' workers do; "pid" and "threads" ask, "die" dies, a number is doubled."""
    if job == "pid":
        return os.getpid()
    if job == "threads":
        return torch.get_num_threads()
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "wrong":
        raise UsageError("the job is wrong")
    return 2 * int(str(job))


def test_results_are_of_all_jobs_those_added_meanwhile_included() -> None:
    pool, ticks, found = Pool(work, 2), [], {}
    for job in (1, 2, 3):
        pool.add(job)
    for job, result in pool.results(lambda: ticks.append(None), seconds=0.1):
        assert job not in found
        found[job] = result
        if job < 100:
            pool.add(100 * job)
    assert found == {job: 2 * job for job in (1, 2, 3, 100, 200, 300)}
    assert ticks  # it was told that time passes


def test_a_pool_without_jobs_starts_nothing() -> None:
    pool = Pool(work, 2)
    assert list(pool.results(lambda: None)) == [] and not pool.running


def test_each_worker_has_its_share_of_the_cores() -> None:
    for workers in (1, 2):
        pool = Pool(work, workers)
        pool.add("threads")
        assert list(pool.results(lambda: None)) == [("threads", max(1, (os.cpu_count() or 1) // workers))]


def test_a_killed_worker_is_one_clear_error() -> None:
    pool = Pool(work, 1)
    pool.add("die")
    with pytest.raises(BestiaryError, match=KILLED) as error:
        list(pool.results(lambda: None))
    assert type(error.value) is BestiaryError


def test_a_job_added_after_a_worker_was_killed_is_the_same_error() -> None:
    pool = Pool(work, 1)
    pool.add("pid")
    results = pool.results(lambda: None)
    _, pid = next(results)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BestiaryError, match=KILLED):
        for _ in range(600):  # until the pool has seen it
            pool.add("pid")
            time.sleep(0.1)
    results.close()


def test_the_error_of_a_job_is_raised_as_it_is() -> None:
    pool = Pool(work, 1)
    pool.add("wrong")
    with pytest.raises(UsageError, match="the job is wrong"):
        list(pool.results(lambda: None))


def test_an_interrupt_waits_for_what_runs_and_drops_what_has_not_begun() -> None:
    pool = Pool(work, 1)
    for job in range(100):
        pool.add(job)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pool.results(interrupt))
    done = [future for future in pool.running if future.done() and not future.cancelled()]
    assert all(future.done() for future in pool.running) and len(done) < 100


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from bestiary.studies.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(time.sleep, 1)\n"
        "    pool.add(0.1)\n"
        "    list_of = iter(pool.results(lambda: None))\n"
        "    next(list_of)\n"
        "    print(*pool.executor._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it lives
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
