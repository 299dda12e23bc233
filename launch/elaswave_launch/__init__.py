"""Commands: elaswave-launch starts a job, elaswave operates a running one."""
