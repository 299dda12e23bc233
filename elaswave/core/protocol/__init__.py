"""The step and recovery protocol of a worker as a pure state machine."""
