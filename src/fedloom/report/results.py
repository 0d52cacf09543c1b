"""What a comparison came to, as Python gets it: with the pictures of its page."""

from __future__ import annotations

from fedloom.comparison import results
from fedloom.comparison.layout import folder
from fedloom.errors import UsageError, unknown
from fedloom.report.comparison import pictures
from fedloom.report.picture import Picture


class Results(results.Results):
    """A comparison's folder: what was asked (`spec`) and every cell, by setting, then method, then seed.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> results = fedloom.compare(["fedavg", "fedprox"], Toy(), seeds=1, rounds=1, report=False)
        >>> results.methods, results.seeds, results.unfinished
        (('fedavg', 'fedprox'), (0,), [])
        >>> results.plot("scores")
        Picture('a-Toy-given-in-Python: personal test accuracy')
    """

    @staticmethod
    def shown(found: results.Results) -> Results:
        """The same, with pictures."""
        made = Results(found.path, found.spec, found.cells)
        made.__dict__["found"] = found  # with which a temporary folder would go
        return made

    def plot(self, name: str | None = None) -> Picture:
        """A picture of the comparison, which shows itself in a notebook; `plot("scores").save("scores.pdf")` writes it.

        They are those of the report's page, and `name` is one of `pictures`; where there is one setting, its name may
        be left out (`scores`). Without a name it is the scores of the first setting. Raises UsageError where there is
        none of that name, or no run is finished.
        """
        found = self.pictures
        if not found:
            raise UsageError(f"{self.path} has no finished run to draw; {len(self.unfinished)} are still to be done")
        first = folder(self.settings[0])
        short = f"{first}-{name or 'scores'}"
        if name in found:
            return found[name]
        if short in found and (name is None or len(self.settings) == 1):
            return found[short]
        if name is None:  # of the first setting no run is finished
            return next(iter(found.values()))
        known = [one.removeprefix(f"{first}-") if len(self.settings) == 1 else one for one in found]
        raise unknown("picture of a comparison", name, known)

    @property
    def pictures(self) -> dict[str, Picture]:
        """The pictures of the report's page by name, those of each setting behind its own: `skewed-scores`."""
        return pictures(self)
