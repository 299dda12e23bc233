"""Trains the transformer under elaswave-launch."""

import argparse

from transformer import (
    LEARNING_RATE,
    MICRO_BATCH,
    MICRO_BATCHES,
    SEED,
    SIZES,
    RandomTokens,
    layer_factories,
    next_token_loss,
)

import elaswave as ew


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--accumulation", choices=("exact64", "float32"), default="exact64")
    found = parser.parse_args()
    ew.train(
        ew.Job(
            layers=layer_factories(SIZES[found.size].channels),
            loss=next_token_loss,
            data=RandomTokens(),
            optimizer=ew.AdamW(lr=LEARNING_RATE),
            global_batch=MICRO_BATCHES * MICRO_BATCH,
            micro_batch=MICRO_BATCH,
            steps=found.steps,
            seed=SEED,
            accumulation=found.accumulation,
        )
    )


if __name__ == "__main__":
    main()
