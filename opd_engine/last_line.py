"""A command's one line of error, and under torchrun once more as the last line of all.

torchrun reports a failed rank in thirty lines of its own, after the rank has ended, and buries what the rank said.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Waits for the launcher, then writes. One of a launcher's ranks is enough: the first to bind a name of the launcher's.
_WAITER = """
import os, socket, sys, time
launcher, line = int(sys.argv[1]), sys.argv[2]
name = socket.socket(socket.AF_UNIX)
try:
    name.bind("\\0opd_engine-%d" % launcher)
except OSError:
    sys.exit()
def runs():
    try:
        with open("/proc/%d/stat" % launcher) as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
end = time.monotonic() + 60
while runs() and time.monotonic() < end:
    time.sleep(0.02)
print(line, file=sys.stderr, flush=True)
"""


def say_error(line: str) -> None:
    """Print a command's error, now and, where torchrun started this rank, after torchrun's own report."""
    print(line, file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.path.isdir("/proc/self"):
        # A session of its own: the launcher ends the groups of its ranks.
        command = [sys.executable, "-S", "-E", "-c", _WAITER, str(os.getppid()), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
