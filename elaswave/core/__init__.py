"""Pure decisions: layout, routes, schedules, placement, protocol, planning. No I/O, clock, thread or randomness."""
