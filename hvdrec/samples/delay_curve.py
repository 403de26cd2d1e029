"""Estimate the distribution of delays from exposures that were observed for different times.

For exposures near the end of the log, late feedback is not in the log yet. So each exposure counts
as observed until its first feedback or the end of the log. The estimator of Kaplan and Meier
(Nonparametric estimation from incomplete observations, JASA 1958) then gives the share of exposures
that have no feedback yet after each delay; 1 minus this share is the share with feedback. Delays
are divided into bins. An exposure whose observation ends in a bin, without feedback, counts half in
this bin (the actuarial estimate). The variance of the estimate is Greenwood's (1926).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATIO = 1.002
"""Ratio of the upper to the lower edge of a bin: delays are rounded by at most 0.2 %."""
Z = 1.96
"""Quantile of the normal distribution for intervals of 95 %."""
TAIL = 0.025
"""Probability below the lower end of such an interval, and above its upper end."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class DelayCurve:
    """The share of positives whose first feedback comes within a window.

    A positive is an exposure with feedback within the longest window, `windows[-1]`. All arrays
    have one entry per window.

    Attributes:
        windows: Windows in microseconds, ascending, float64 [n].
        incidence: Share of all exposures with feedback within the window, float64 [n].
        error: Variance of the logarithm of 1 - incidence, float64 [n].
        positives: Number of positives that were observed.
    """

    windows: Array
    incidence: Array
    error: Array
    positives: int

    @property
    def caught(self) -> Array:
        """Share of the positives that each window catches, float64 [n]."""
        return np.asarray(self.incidence / self.incidence[-1])

    def interval(self) -> tuple[Array, Array]:
        """Return the lower and upper ends of 95 % intervals of `caught`, each float64 [n].

        `caught` is a ratio of two incidences. Its variance follows from their variances by the
        delta method. The interval is symmetric in the log-odds, so it stays between 0 and 1. Where
        all or none of the positives are caught, it is the interval of Clopper and Pearson for the
        number of positives.
        """
        share, total = self.caught, self.incidence[-1]
        ours, all_ = -(1 - self.incidence) / total, share * (1 - total) / total
        variance = ours**2 * self.error + all_**2 * self.error[-1] + 2 * ours * all_ * self.error
        inside = (share > 0) & (share < 1)
        spread = np.zeros_like(share)
        odds = np.zeros_like(share)
        product = share[inside] * (1 - share[inside])
        spread[inside] = Z * np.sqrt(np.maximum(variance[inside], 0)) / product
        odds[inside] = np.log(share[inside] / (1 - share[inside]))
        low, high = 1 / (1 + np.exp(spread - odds)), 1 / (1 + np.exp(-spread - odds))
        rest = TAIL ** (1 / self.positives)
        return (
            np.where(inside, low, np.where(share == 1, rest, 0.0)),
            np.where(inside, high, np.where(share == 0, 1 - rest, 1.0)),
        )

    def at(self, window: float) -> int:
        """Return the index in `windows` of the bin that a window in microseconds falls into."""
        return min(delay_bin(window), len(self.windows) - 1)

    def smallest(self, share: float) -> tuple[float, float, float | None]:
        """Return the smallest window that catches a share of the positives, and its 95 % interval.

        This interval holds the windows whose `interval` includes the share (Brookmeyer and Crowley,
        A confidence interval for the median survival time, Biometrics 1982). The upper end is None
        if it is beyond the longest window.
        """
        low, high = self.interval()
        sure = np.flatnonzero(low[:-1] >= share)
        return (
            float(self.windows[np.argmax(self.caught >= share)]),
            float(self.windows[np.argmax(high >= share)]),
            float(self.windows[sure[0]]) if len(sure) else None,
        )


def delay_bin(duration: float) -> int:
    """Return the number of the bin of a duration in microseconds; bin 0 holds durations up to 1."""
    return math.floor(math.log(max(duration, 1)) / math.log(RATIO))


def estimate(
    events: Mapping[int, int], censored: Mapping[int, int], last: int
) -> DelayCurve | None:
    """Estimate the curve of delays.

    Args:
        events: Bin of a delay -> number of exposures whose first feedback has this delay.
        censored: Bin of a duration -> number of exposures without feedback that were observed for
            this duration.
        last: The bin that ends with the longest window.

    Returns:
        The curve; None if there are no events up to the longest window.
    """
    done, left = np.zeros(last + 2), np.zeros(last + 2)
    for counts, array in ((events, done), (censored, left)):
        for number, rows in counts.items():
            array[min(number, last + 1)] += rows
    leaving = (done + left)[::-1].cumsum()[::-1]
    risk = (leaving - left / 2)[: last + 1]
    done = done[: last + 1]
    if not done.any():
        return None
    used = np.flatnonzero(done)
    hazard = np.minimum(done[used] / risk[used], 1 - 1e-12)
    survival, error = np.ones(last + 1), np.zeros(last + 1)
    survival[used], error[used] = 1 - hazard, hazard / (risk[used] * (1 - hazard))
    windows = np.power(RATIO, np.arange(1, last + 2, dtype=np.float64))
    return DelayCurve(windows, 1 - survival.cumprod(), error.cumsum(), int(done.sum()))
