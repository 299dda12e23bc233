"""The core under a virtual world: explicit-state model of the protocol, seeded faults."""
