"""Runs a command that cannot outlive its owner: `python -I -S parent_death.py OWNER_PID COMMAND [ARGUMENT ...]`.

On Linux the kernel kills the command (PR_SET_PDEATHSIG with SIGKILL) when the thread that started it ends for any
reason, so that a killed owner leaves no processes behind. The command replaces this process and keeps its pid. Other
systems have no such call: there, only an orderly end stops the command.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the parent-death signal, then become the command."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != owner:  # the owner ended before the call above
            raise SystemExit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
