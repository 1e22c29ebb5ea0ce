"""Progress of long work: a bar on a terminal, and elsewhere a plain line once a minute."""
import sys
import time
from collections import deque

from tqdm import tqdm

from support.ranks import rank

INTERVAL = 60  # seconds between lines; shorter work prints none
REMEMBERED = 10  # lines over which the rate is taken: it changes as prefixes and replies get longer


def progress_bar(iterable=None, total=None, desc="", unit="it", unit_scale=False):
    """A tqdm where stderr is a terminal, and `ProgressLines` elsewhere.

    Of several processes under torchrun the first shows it.
    """
    if sys.stderr.isatty():
        quiet = rank() > 0
        return tqdm(iterable, desc, total, unit=unit, unit_scale=unit_scale, disable=quiet)
    return ProgressLines(iterable, total, desc, unit, unit_scale)


class ProgressLines:
    """What a tqdm shows, as whole lines on stderr, at most one a minute.

    A line is written when something is done, so that work that hangs writes none. iterable, total
    (how many there are), desc, unit and the methods are those of tqdm. `unit_scale`: write 5000000
    as 5M.
    """

    def __init__(self, iterable=None, total=None, desc="", unit="it", unit_scale=False):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable = iterable
        self.total = total
        self.desc = desc
        self.unit = unit
        self.unit_scale = unit_scale
        self.note = ""
        self.done = 0
        self.started = time.monotonic()
        self.due = self.started + INTERVAL
        self.marks = deque([(self.started, 0)], REMEMBERED)  # (when, how much was done) of lines

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n=1):
        """Count n more as done, and write a line if it is time to."""
        self.done += n
        now = time.monotonic()
        if now - self.started < 1:
            self.marks[0] = now, self.done  # a restart skips these: they say nothing of the rate
        if now < self.due or rank() > 0:
            return
        sys.stdout.flush()  # where both go to one file, no line ends up inside another
        sys.stderr.write(self.line(now) + "\n")  # in one piece
        self.marks.append((now, self.done))
        self.due = now + INTERVAL

    def set_postfix_str(self, note, refresh=True):
        """The text behind the numbers of the next line."""
        self.note = note

    def line(self, now):
        """The line as it is at the time `now`.

        >>> bar = ProgressLines(total=6000, desc="rollouts", unit="req")
        >>> bar.done = 1240
        >>> bar.set_postfix_str("1450 tokens/s")
        >>> bar.line(bar.started + 400)
        'rollouts: 1,240 of 6,000 req (21%), 3.1 req/s, 26 min left, 1450 tokens/s'
        """
        since, before = self.marks[0]
        rate = (self.done - before) / max(now - since, 1e-9)  # a second
        parts = [f"{self.desc}: {self._number(self.done)} {self.unit}"]
        if self.total:
            counted = f"{self._number(self.done)} of {self._number(self.total)} {self.unit}"
            parts = [f"{self.desc}: {counted} ({self.done / self.total:.0%})"]
        parts.append(self._rate(rate))
        if self.total and rate:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    def _number(self, n):
        return tqdm.format_sizeof(n) if self.unit_scale else f"{n:,}"

    def _rate(self, rate):
        if self.unit_scale:
            return f"{self._number(rate)}{self.unit}/s"
        if rate < 1:
            return f"{60 * rate:.1f} {self.unit}/min"
        return f"{rate:.1f} {self.unit}/s"


def duration(seconds):
    """A time as people say it.

    >>> duration(40), duration(1400), duration(9000)
    ('40 s', '23 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
