"""What a user can do, in the words of the face that they came through: an own loop, a callback or an adapter."""

from __future__ import annotations

from typing import NamedTuple

from keepbest.metric import DEFAULT_REMEDY
from keepbest.run.takeover import OWN_LOOP, Existing


class Face(NamedTuple):
    """The words of one face; those of the own loop where it says nothing else.

    Attributes:
        existing: With a run that is there.
        missing: Where a rank lacks the metric.
        unobserved: Where nothing was observed until the end.
    """

    existing: Existing = OWN_LOOP
    missing: str = DEFAULT_REMEDY
    unobserved: str = "call observe() after each evaluation"

    def resumed_by(self, resume: str) -> Face:
        """The same face, where a run that is there is resumed in another way."""
        return self._replace(existing=self.existing._replace(resume=resume))
