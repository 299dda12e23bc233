import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import Site


@pytest.fixture
def site() -> Iterator[Site]:
    # Short: paths of Unix sockets are limited to 107 bytes, and those of tmp_path grow with the test's name.
    folder = Path(tempfile.mkdtemp(prefix="ew-"))
    yield Site(folder)
    shutil.rmtree(folder)
