import re
import signal

import pytest

from tests.coursework.exercises import EXERCISES, SECONDS


def pytest_configure(config):
    for exercise in EXERCISES:
        config.addinivalue_line("markers", f"exercise_{exercise.number}: {exercise.title}")


def pytest_ignore_collect(collection_path, config):
    """With `-m exercise_3` the files of other exercises are not read: they may be no Python yet."""
    chosen = re.fullmatch(r"exercise_(\d+)", config.option.markexpr)
    found = re.match(r"test_exercise_(\d+)_", collection_path.name)
    return True if chosen and found and int(found[1]) != int(chosen[1]) else None


@pytest.fixture(autouse=True)
def _limit():
    """An endless loop ends, as it does in grading."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def stop(*_):
        raise TimeoutError(f"took more than {SECONDS:g} s: an endless loop?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
