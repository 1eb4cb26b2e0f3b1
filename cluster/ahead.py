"""The plan of a run that is launched: made before anything starts where it could be refused, else meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.cheapest import refuse_what_cannot_fit
from trainer.plan import Estimate, estimate, surely_fits
from trainer.site import NotPlanned, Site, site_of
from trainer.validate import Plan


@dataclass(frozen=True)
class Ahead:
    """A plan, where it is planned for (None: not known), and what it takes, where that is known already."""

    plan: Plan
    site: Site | None
    found: Estimate | None

    @classmethod
    def of(cls, plan: Plan, device: str | None, *, here: bool) -> Ahead:
        """Planned now, unless it surely fits: then `find` may do it while other things start.

        Raises:
            UsageError: it cannot fit; with the cheapest change that does. NotFound: no such device.
        """
        site = None
        try:
            site = site_of(plan.config, device, here=here)
            if surely_fits(plan, site):
                return cls(plan, site, None)
            found = estimate(plan, site)
        except NotPlanned:
            return cls(plan, None, None)
        refuse_what_cannot_fit(found)
        return cls(plan, site, found)

    def find(self) -> Estimate | None:
        """What the run takes; None where it cannot be told."""
        if self.found is not None or self.site is None:
            return self.found
        try:
            return estimate(self.plan, self.site)
        except NotPlanned:
            return None
