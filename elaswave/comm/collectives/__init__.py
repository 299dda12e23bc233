"""Collectives as generators over ranks and flat tensors; see docs/adr/0009-communicators.md."""
