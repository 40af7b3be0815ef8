"""Which sources of mixed data have metrics of their own: a column `source`, or the files and gym tasks of a mixture."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from stepcredit.forest.types import Problem

log = logging.getLogger("stepcredit")

OTHER, UNNAMED = "other", "unnamed"


@dataclass(frozen=True)
class Sources:
    """
    Attributes:
        labels: what metrics are named by; none where all problems are from one source.
        named: the sources that are labels of their own.
    """

    labels: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()

    def label(self, source: str) -> str:
        """The label that problems of a source count under."""
        source = source or UNNAMED
        return source if source in self.named else OTHER


NO_SOURCES = Sources()


def reported_sources(training: Sequence[str], held_out: Sequence[Problem], most: int) -> Sources:
    """The first `most` sources, and one label for all others.

    Args:
        training: sources of the training problems, the most frequent first.
        held_out: the problems of evaluations; their sources come behind those of training.
        most: 0 reports none.
    """
    evaluated = sorted({problem.source for problem in held_out} - set(training))
    sources = [source or UNNAMED for source in [*training, *evaluated]]
    if len(sources) < 2 or most == 0:
        return NO_SOURCES
    named = sources[:most]
    if len(sources) > most:
        text = "metrics by source: the first %d of %d sources have their own, the rest is 'other' (track.max_sources)"
        log.warning(text, most, len(sources))
    labels = dict.fromkeys([*named, *([OTHER] if len(sources) > most else [])])
    return Sources(tuple(labels), frozenset(named))
