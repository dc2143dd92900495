"""Estimates the remaining time of a stage, logged once after its first steps."""

from collections.abc import Callable

from engine.runtime.run import clock

LEAST = 60  # seconds; shorter times are not logged
WARM_UP, MEASURED = 3, 20  # student steps: those before the measurement, and those measured


def log_time_left(log: Callable[[str], None], what: str, seconds: float) -> None:
    """Logs the remaining time in one line, if it is more than a minute."""
    if seconds > LEAST:
        log(f"{what}: about {duration(seconds)}")


def duration(seconds: float) -> str:
    """Returns a duration in words: "12 min", "3 h 20 min" or "2 d 5 h"."""
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class StepPace:
    """Estimates the remaining time of stage distill from its first student steps and its first rounds of synthesis.

    Args:
        log: function that takes one line of text.
        distillation: ``engine.loops.distill.Distillation``.
        start: number of rounds done by earlier commands.
    """

    def __init__(self, log: Callable[[str], None], distillation, start: int):
        self.log, self.distillation, self.start, self.steps = log, distillation, start, 0
        self.synthesis_before = distillation.synthesis_clock.read()

    def step(self) -> None:
        """Counts a student step; logs the estimate once enough steps are measured. Call it after every student step."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.first = self._now()
        elif self.steps == WARM_UP + MEASURED:
            self._log_estimate()

    def _now(self) -> tuple[float, float]:
        """Returns (clock time, seconds of synthesis so far), after the device has finished its queued work."""
        synthesis = self.distillation.synthesis_clock.read() - self.synthesis_before
        return clock(self.distillation.precision.device), synthesis

    def _log_estimate(self) -> None:
        schedule = self.distillation.schedule
        begun = -(-self.steps // schedule.kd_steps)  # rounds
        (first, before), (last, synthesis) = self.first, self._now()
        per_step = (last - first - (synthesis - before)) / MEASURED
        steps = (schedule.rounds - self.start) * schedule.kd_steps - self.steps
        rounds = schedule.rounds - self.start - begun
        seconds = per_step * steps + synthesis / begun * rounds
        log_time_left(self.log, "time left in stage distill (the last stage), without the evaluations", seconds)
