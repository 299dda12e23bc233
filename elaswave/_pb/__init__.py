"""Code generated from protos/ by scripts/generate_protos.py; imported by wire modules only."""
