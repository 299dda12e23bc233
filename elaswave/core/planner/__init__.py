"""Plans as pure functions of the last persisted plan and of reports."""
