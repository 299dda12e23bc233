"""Parts of the controller's state machine."""
