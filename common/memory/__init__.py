"""How a run fits into memory, counted before anything is loaded."""

from common.memory.fit import check_twice_differentiated, free_bytes, settle
from common.memory.ways import MemoryPlan, plan

__all__ = ["MemoryPlan", "check_twice_differentiated", "free_bytes", "plan", "settle"]
