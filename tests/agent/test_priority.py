"""An urgent process goes before others where that is permitted; its children do not inherit it."""

import os
import subprocess
import sys

from elaswave.priority import PATIENT_NICE, URGENT_NICE

_SHOW = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"


def _nice_after(*calls: str) -> int:
    code = f"from elaswave.priority import *; {'; '.join(call + '()' for call in calls)}; {_SHOW}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return int(found.stdout)


def test_urgent_where_permitted_and_unchanged_elsewhere() -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert _nice_after("be_urgent") == (URGENT_NICE if os.geteuid() == 0 else here)


def test_patient_where_it_can_be_undone_and_all_threads_come_back() -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    permitted = os.geteuid() == 0 and here == 0
    assert _nice_after("be_patient") == (PATIENT_NICE if permitted else here)
    thread = "import threading; held = threading.Event(); threading.Thread(target=held.wait).start"
    told = "print(sorted({os.getpriority(os.PRIO_PROCESS, int(one)) for one in os.listdir('/proc/self/task')}))"
    code = f"from elaswave.priority import *; be_patient(); {thread}(); be_ordinary(); {told}; held.set()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == f"[{here}]\n"


def test_a_child_of_an_urgent_process_is_ordinary_again() -> None:
    assert _nice_after("be_urgent", "be_ordinary") == os.getpriority(os.PRIO_PROCESS, 0)
