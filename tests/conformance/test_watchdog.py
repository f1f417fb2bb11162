# SPDX-License-Identifier: Apache-2.0
"""What hangs is ended and reported, and what comes after it is checked all the same."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from fulgurite.intervention import Intervention
from fulgurite.testing import Case, check_component, watchdog
from fulgurite.testing.composition import Member, check_composition
from fulgurite.testing.watchdog import HangError, ended_after


def sleep():
    time.sleep(60)


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_queue():
    queue.Queue().get()


def wait_for_a_process():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False)


def go_round():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


@pytest.mark.parametrize("hang", [sleep, wait_for_a_lock, wait_for_a_queue, wait_for_a_process, go_round])
def test_what_hangs_is_ended_and_named(hang):
    begin = time.monotonic()
    where = rf"it did not end in 0\.2 s, and hung in {hang.__name__} \(.*test_watchdog.py:\d"
    with pytest.raises(HangError, match=where), ended_after(0.2):
        hang()
    assert time.monotonic() - begin < 5.0


def test_what_ends_in_time_is_left_alone():
    """Fails if an alarm, its handler or the thread that watches stays behind."""
    before = signal.getsignal(signal.SIGALRM), threading.active_count()
    with ended_after(60.0):
        pass
    assert (signal.getsignal(signal.SIGALRM), threading.active_count()) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_alarm_of_another_goes_on():
    """Fails if a time limit of the test runner's is lost by a check."""
    heard = []
    handler = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with ended_after(60.0):
            pass
        assert 0.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
    assert heard == [1]


def test_what_hangs_again_while_it_is_ended_is_ended_again(monkeypatch):
    monkeypatch.setattr(watchdog, "_AGAIN", 0.2)
    begin = time.monotonic()

    def hang_twice():
        try:
            sleep()
        finally:
            wait_for_a_lock()

    with pytest.raises(HangError), ended_after(0.2):
        hang_twice()
    assert time.monotonic() - begin < 5.0


def test_where_no_alarm_reaches_the_process_says_where_and_ends():
    """Fails if a build waits for ever for what cannot be interrupted: here, in another thread than the main one."""
    program = (
        "import threading\n"
        "from fulgurite.testing import watchdog\n"
        "watchdog.GRACE = 0.2\n"
        "def hang_here():\n"
        "    with watchdog.ended_after(0.2):\n"
        "        threading.Event().wait()\n"
        "thread = threading.Thread(target=hang_here)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 70
    assert "did not end in 0.2 s and cannot be interrupted" in found.stderr
    assert "in hang_here" in found.stderr


class Hangs(Intervention):
    """Waits for ever in the middle of the first epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            wait_for_a_queue()


def test_a_check_that_hangs_is_a_failure_and_the_next_one_is_run(monkeypatch):
    monkeypatch.setattr(watchdog, "TIME_LIMIT", 0.5)
    names = ["weight_averaging", "bf16", "constructor_draws_nothing"]
    results = {r.check: r for r in check_component(Hangs, cases=[Case()], names=names)}
    assert results["weight_averaging"].status == "fail"
    assert "it did not end in 0.5 s, and hung in wait_for_a_queue" in results["weight_averaging"].reason
    assert "on_train_batch_start" in results["weight_averaging"].detail
    assert results["constructor_draws_nothing"].status == "pass"


def test_a_training_that_hung_is_not_repeated(monkeypatch):
    """Fails if every check that shares the training waits for it anew."""
    monkeypatch.setattr(watchdog, "TIME_LIMIT", 1.0)
    names = ["fp16_loss_scale", "state_key"]
    calls = []

    def make():
        calls.append(1)
        return Hangs()

    begin = time.monotonic()
    results = list(check_component(Hangs, cases=[Case(make=make)], names=["bf16", "weight_averaging", *names]))
    assert {r.check for r in results if "hung in" in r.reason} >= {"bf16", "weight_averaging"}
    assert time.monotonic() - begin < 6.0
    assert len(calls) < 8


def test_a_pair_that_hangs_is_a_failure(monkeypatch):
    monkeypatch.setattr(watchdog, "TIME_LIMIT", 0.5)
    results = list(check_composition([Member("hangs", Hangs, Case()), Member("other", Intervention, Case())]))
    assert [(r.status, "hung in wait_for_a_queue" in r.reason) for r in results] == [("fail", True)] * 2
