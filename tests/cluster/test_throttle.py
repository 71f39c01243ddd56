"""A throttle against a clock of our own."""

import pytest

from jaxsys.cluster import throttle as throttles
from jaxsys.cluster.throttle import FULL_SPEED, Throttle, throttle_of, throttled
from jaxsys.core.errors import UserError


class _Clock:
    """Time that passes only when somebody works, waits for the core or sleeps."""

    def __init__(self):
        self.now_s = self.cpu_s = self.slept_s = 0.0

    def work(self, seconds, waited_s=0.0):
        self.now_s += seconds + waited_s
        self.cpu_s += seconds

    def perf_counter(self):
        return self.now_s

    def process_time(self):
        return self.cpu_s

    def sleep(self, seconds):
        self.now_s += seconds + throttles._LATE_S  # as the kernel does
        self.slept_s += seconds


@pytest.fixture
def clock(monkeypatch):
    found = _Clock()
    monkeypatch.setattr(throttles, "time", found)
    return found


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("pause_s", [0.0, 3.0])
def test_work_takes_its_share_whatever_came_before(clock, share, pause_s):
    throttle = Throttle(share)
    for work_s in (0.5, 0.001, 0.02):
        clock.now_s += pause_s
        begin_s = clock.now_s
        throttle.begin()
        clock.work(work_s)
        throttle.pay()
        assert clock.now_s - begin_s == pytest.approx(work_s / share)


def test_what_others_take_of_the_core_is_part_of_the_sleep(clock):
    throttle = Throttle(0.25)
    clock.work(1.0, waited_s=2.0)
    throttle.pay()
    assert clock.now_s == pytest.approx(4.0)
    clock.work(0.0, waited_s=1.0)  # late already: nothing is slept
    slept_s = clock.slept_s
    throttle.pay()
    assert clock.slept_s == slept_s


def test_a_piece_can_be_paid_in_parts(clock):
    throttle = Throttle(0.5)
    for _ in range(3):
        clock.work(1.0)
        throttle.pay()
    assert clock.now_s == pytest.approx(6.0)


def test_full_speed_never_sleeps(clock):
    clock.work(1.0)
    FULL_SPEED.pay()
    assert clock.slept_s == 0


def test_a_process_finds_the_throttle_that_its_command_was_given():
    words = throttled(0.3, ["train"])
    name, value = words[1].split("=")
    assert throttle_of({name: value}).share == 0.3
    assert [words[0], *words[2:]] == ["env", "train"]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_shares_that_cannot_be_are_refused(share):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        Throttle(share)
