"""Bugs in nodes, as the log tells them: each with its traceback, none over and over."""

from __future__ import annotations

import logging

from cloudfs.node import BrokenNodeError

log = logging.getLogger(__name__)

PLACES = 1000
"""Places in the code whose bugs are told apart."""


class BugLog:
    """Counts bugs by their place in the code, and logs the 1st, 10th, 100th … of each."""

    def __init__(self) -> None:
        self._counts: dict[tuple[type[BaseException], str, str, int], int] = {}

    def report(self, error: BaseException, what: str) -> None:
        """Log a bug that `what` met, unless its like was logged already.

        A BrokenNodeError is raised by who checks, so the node's class, its first word, tells it apart too.
        """
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        whose = str(error).partition(" ")[0] if isinstance(error, BrokenNodeError) else ""
        place = (type(error), whose, at.tb_frame.f_code.co_filename if at else "", at.tb_lineno if at else 0)
        if len(self._counts) > PLACES:
            self._counts.clear()
        count = self._counts[place] = self._counts.get(place, 0) + 1
        if str(count).strip("0") == "1":
            log.error("%s met a bug (number %d of its kind)", what, count, exc_info=error)
