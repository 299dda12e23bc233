"""The controller: turns events of a job into persisted plans."""
