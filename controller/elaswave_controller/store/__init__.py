"""Where the controller keeps what must outlive a message: plans, by compare-and-set."""

from elaswave_controller.store.interface import Compacted, Entry, Outcome, Store
from elaswave_controller.store.memory import MemoryStore

__all__ = ["Compacted", "Entry", "MemoryStore", "Outcome", "Store"]
