"""The controller's part of a durable checkpoint: the index that makes the workers' files a checkpoint.

Layout: `<save_dir>/step_<k>/checkpoint.json` and `<save_dir>/latest`, a file with the name of the newest step folder.
"""

import json
from pathlib import Path

from elaswave.core.events import CommitCheckpoint
from elaswave.errors import ProtocolError
from elaswave_controller.files import sync_folder, write_atomically

INDEX_VERSION = 1


def commit_checkpoint(save_dir: Path, effect: CommitCheckpoint) -> Path:
    """Write the index of `effect.step`, then make it the latest; returns the step's folder.

    A crash in between leaves the older checkpoint the latest. Raises OSError; ProtocolError where a manifest of a
    worker is not a JSON object.
    """
    folder = save_dir / f"step_{effect.step}"
    index = {
        "version": INDEX_VERSION,
        "step": effect.step,
        "parts": [_manifest(text, effect) for text in effect.manifests],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "checkpoint.json", json.dumps(index, indent=1) + "\n")
    sync_folder(save_dir)
    write_atomically(save_dir / "latest", folder.name + "\n")
    return folder


def _manifest(text: str, effect: CommitCheckpoint) -> object:
    try:
        manifest: object = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"checkpoint of step {effect.step}: a worker's manifest is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ProtocolError(f"checkpoint of step {effect.step}: a worker's manifest is no JSON object: {text:.80}")
    return manifest
