"""The project's own extractor of archive indexes.

Its work and its writes grow with the change and not with the tree. `plan` says what has to be
fetched, `build` makes the new tree beside the old one, `tree` compares a tree with its record,
`leftover` is what a build that was cut off leaves for the next one.
"""

from casync_updater.cycle.extract.build import Extracted, extract
from casync_updater.cycle.extract.leftover import Leftover
from casync_updater.cycle.extract.plan import ExtractPlan, plan_extract, supported
from casync_updater.cycle.extract.rebuild import rebuild_record
from casync_updater.cycle.extract.tree import verify_tree

__all__ = [
    "ExtractPlan",
    "Extracted",
    "Leftover",
    "extract",
    "plan_extract",
    "rebuild_record",
    "supported",
    "verify_tree",
]
