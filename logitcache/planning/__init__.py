"""What a dump would cost and be worth, from a sample on the machine at hand."""

from logitcache.planning.options import PlanOptions, planned_outputs
from logitcache.planning.report import DumpPlan, PlannedCache
from logitcache.planning.run import make_plan

__all__ = ["DumpPlan", "PlanOptions", "PlannedCache", "make_plan", "planned_outputs"]
