"""Questions that got no answer for a reason that passes: they are left open, and asked again.

A judge whose question stays without an answer first asks all its other questions, and then raises
Unanswered. So nobody takes a missing answer for a verdict, and whoever can use the other answers
reads them through `answers_so_far`.
"""
from typing import NamedTuple

from support.errors import ServiceError


class NoAnswer(NamedTuple):
    """Stands in the place of an answer that is missing, and says why. It is never stored."""
    reason: str


class Unanswered(ServiceError):
    """`missing` of `total` verdicts are not there yet, the last for the `reason`.

    answers: those from the first missing one on, with a NoAnswer for each that is missing.
    """

    def __init__(self, missing, total, reason, answers=()):
        super().__init__(
            f"{missing} of {total} verdicts are missing. The last failure: {reason}. "
            "All others are kept; run the same command again to ask for those that are missing."
        )
        self.missing = missing
        self.total = total
        self.reason = reason
        self.answers = answers


def gaps_last(answers):
    """Yield the answers before the first NoAnswer; where there is one, raise Unanswered at the end.

    All answers are waited for before that, so that a server is asked all questions.
    """
    given = 0
    held_back = []
    missing = []
    for answer in answers:
        if isinstance(answer, NoAnswer):
            missing.append(answer)
        if missing:
            held_back.append(answer)
        else:
            given += 1
            yield answer
    if missing:
        total = given + len(held_back)
        raise Unanswered(len(missing), total, missing[-1].reason, held_back)


def answers_so_far(answers):
    """Yield the answers of a judge in order, with a NoAnswer for each that is missing.

    >>> def answers():
    ...     yield "full"
    ...     raise Unanswered(1, 3, "status 503", [NoAnswer("status 503"), "partial"])
    >>> list(answers_so_far(answers()))
    ['full', NoAnswer(reason='status 503'), 'partial']
    """
    try:
        yield from answers
    except Unanswered as error:
        yield from error.answers


class AnsweredRecords:
    """An Appender that leaves out the records with a NoAnswer in them, and counts these."""

    def __init__(self, appender):
        self.appender = appender
        self.done = appender.done
        self.read = appender.read
        self.reasons = []  # one for each record that was left out

    def write(self, record):
        """Append a record, unless an answer is missing in it."""
        missing = [value for value in record.values() if isinstance(value, NoAnswer)]
        if missing:
            self.reasons.append(missing[-1].reason)
        else:
            self.appender.write(record)

    def close(self):
        """Close the file; raises Unanswered if records were left out."""
        self.appender.close()
        if self.reasons:
            missing = len(self.reasons)
            raise Unanswered(missing, missing + len(self.done), self.reasons[-1])


def raise_together(errors):
    """Raise one Unanswered for several, if there are any."""
    if errors:
        missing = sum(error.missing for error in errors)
        total = sum(error.total for error in errors)
        raise Unanswered(missing, total, errors[-1].reason)
