"""The threads that do the work of calls: none waits for another kind, errors reach the caller, and all end."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Generator

import pytest

from ormo_rpc.control.dispatch import WAITING_THREADS, Dispatcher
from tests.support.processes import wait_until

SECONDS = 20.0


@pytest.fixture
def dispatcher() -> Generator[Dispatcher]:
    made = Dispatcher()
    yield made
    made.close()


def test_calls_run_in_threads_that_were_there_before(dispatcher: Dispatcher) -> None:
    ran, done = set[threading.Thread](), threading.Semaphore(0)
    before = threading.active_count()

    def call() -> None:
        ran.add(threading.current_thread())
        done.release()

    for number in range(100):
        dispatcher.submit(call, may_wait=number % 2 == 0)
    assert all(done.acquire(timeout=SECONDS) for _ in range(100))
    assert ran <= set(dispatcher.threads)
    assert threading.active_count() == before


def test_pushes_go_on_while_all_calls_that_may_wait_do_so(dispatcher: Dispatcher) -> None:
    release, waiting, last = threading.Event(), threading.Semaphore(0), threading.Event()

    def wait() -> None:
        waiting.release()
        release.wait(SECONDS)

    for _ in range(WAITING_THREADS):
        dispatcher.submit(wait, may_wait=True)
    assert all(waiting.acquire(timeout=SECONDS) for _ in range(WAITING_THREADS))
    dispatcher.submit(last.set, may_wait=True)
    for _ in range(50):
        pushed = threading.Event()
        dispatcher.submit(pushed.set)
        assert pushed.wait(SECONDS)
    assert not last.is_set()  # it waits for one of the others
    release.set()
    assert last.wait(SECONDS)


def test_an_error_is_logged_and_told_and_ends_no_thread(dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    told, done = list[Exception](), threading.Semaphore(0)

    def fail() -> None:
        raise ZeroDivisionError("of this test")

    def failed(error: Exception) -> None:
        told.append(error)
        done.release()

    for _ in range(20):
        dispatcher.submit(fail, failed=failed)
    assert all(done.acquire(timeout=SECONDS) for _ in range(20))
    assert {str(error) for error in told} == {"of this test"}
    assert [record.getMessage() for record in caplog.records] == ["a call could not be done"] * 20
    assert all(thread.is_alive() for thread in dispatcher.threads)


def test_closing_ends_all_threads_after_the_calls_that_came_before(dispatcher: Dispatcher) -> None:
    done = threading.Semaphore(0)
    for number in range(100):
        dispatcher.submit(lambda: done.release(), may_wait=number % 2 == 0)
    dispatcher.close()
    assert all(done.acquire(timeout=SECONDS) for _ in range(100))
    for thread in dispatcher.threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_nothing_of_a_call_is_kept_while_its_thread_waits_for_the_next(dispatcher: Dispatcher) -> None:
    class Gradient:
        """Stands for the memory of a push."""

    gradient = Gradient()
    kept, done = weakref.ref(gradient), threading.Event()

    def call(gradient: Gradient = gradient) -> None:
        assert gradient is not None
        done.set()

    dispatcher.submit(call)
    assert done.wait(SECONDS)
    del gradient, call
    wait_until(lambda: gc.collect() >= 0 and kept() is None, "the memory of the call")
