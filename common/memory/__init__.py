"""How a run fits into memory, counted before anything is loaded."""

from common.memory.fit import free_bytes, settle
from common.memory.ways import MemoryPlan, plan

__all__ = ["MemoryPlan", "free_bytes", "plan", "settle"]
