"""The worker process: executes programs, accumulates gradients, keeps shards, trains."""
