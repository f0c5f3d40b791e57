"""What tests of one-step methods watch."""

import pytest

from pfde.one_step.times import StepTimes


@pytest.fixture
def recorded(monkeypatch):
    """The end times of the adaptive steps, as they are accepted."""
    times, append = [], StepTimes.append

    def spy(self, t):
        times.append(t)
        append(self, t)

    monkeypatch.setattr(StepTimes, "append", spy)
    return times
