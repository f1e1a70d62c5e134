"""How much an auxiliary objective counts: the weight alpha of ``L + alpha * R``, scheduled over training steps."""

import math

from rag_lightning.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


def scheduled_weight(step: int, *, schedule: str, start: float, end: float, num_steps: int) -> float:
    """Returns the weight at a step.

    Args:
        step: From 0; after ``num_steps`` the weight stays at ``end``.
        schedule: ``constant`` (``start`` throughout), ``linear``, or ``cosine`` (half a period: flat at both ends).
        start: The weight at step 0.
        end: The weight from step ``num_steps`` on.
        num_steps: How long the way from one to the other takes.

    Raises:
        ConfigError: A negative step.

    >>> [scheduled_weight(step, schedule="linear", start=0.0, end=1.0, num_steps=4) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    >>> scheduled_weight(2, schedule="cosine", start=1.0, end=0.5, num_steps=4)
    0.75
    """
    if step < 0:
        raise ConfigError(f"objective weight: expected a step of 0 or more, got {step}.")
    if schedule == "constant":
        return start
    passed = min(step / num_steps, 1.0)
    if schedule == "cosine":
        passed = 0.5 - 0.5 * math.cos(math.pi * passed)
    return (1.0 - passed) * start + passed * end


def check_schedule(*, schedule: str, start: float, end: float | None, num_steps: int | None) -> None:
    """Refuses a schedule that gives no weight, or hides a setting that was made.

    Raises:
        ConfigError: An unknown schedule, a weight that is no finite number of 0 or more, an end or a length for a
            constant weight, or none for one that changes.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"curriculum.alpha_schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    for setting, value in (("alpha", start), ("alpha_end", end)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"curriculum.{setting}: expected a finite weight of 0 or more, got {value}.")
    if schedule == "constant":
        if end is not None or num_steps is not None:
            raise ConfigError(
                "curriculum.alpha_end and curriculum.alpha_steps: expected none with alpha_schedule=constant, got "
                f"{end} and {num_steps}. Leave them out, or choose linear or cosine."
            )
    elif end is None or num_steps is None or num_steps < 1:
        raise ConfigError(
            f"curriculum.alpha_end and curriculum.alpha_steps: expected a weight and a number of steps of 1 or more "
            f"with alpha_schedule={schedule}, got {end} and {num_steps}. Set both."
        )
