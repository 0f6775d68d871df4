from __future__ import annotations

import threading

import pytest

from keepbest.worker import Inline, Threaded


@pytest.fixture(params=[Inline, lambda: Threaded("test")], ids=["inline", "threaded"])
def worker(request):
    worker = request.param()
    yield worker
    worker.close()


def test_worker_works_in_order_and_reports_what_failed(worker):
    done, failed = [], []
    worker.submit(lambda: done.append(1), failed.append)
    worker.submit(lambda: 1 / 0, failed.append)
    worker.submit(lambda: done.append(2), failed.append)
    worker.drain()
    assert done == [1, 2]
    assert [type(error) for error in failed] == [ZeroDivisionError]


def test_thread_outlives_what_would_end_a_process():
    worker, failed, done = Threaded("test"), [], []
    worker.submit(lambda: (_ for _ in ()).throw(SystemExit(3)), failed.append)
    worker.submit(lambda: done.append(1), failed.append)
    worker.drain()
    assert ([type(error) for error in failed], done) == ([SystemExit], [1])
    assert worker.close(timeout=30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_whose_report_raises():
    worker = Threaded("test")
    worker.submit(lambda: 1 / 0, lambda _: 1 / 0)
    assert worker.close(timeout=30)


def test_job_that_drains_its_own_worker_does_not_wait_for_itself():
    worker, drained = Threaded("test"), threading.Event()
    worker.submit(lambda: (worker.drain(), drained.set()), lambda _: None)
    assert drained.wait(30)
    worker.close()


def test_second_close_does_nothing(worker):
    assert worker.close()
    assert worker.close()
