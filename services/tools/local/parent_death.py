"""Runs a command that cannot outlive its owner: `python -I -S parent_death.py OWNER_PID COMMAND [ARGUMENT ...]`.

On Linux the kernel kills the command (SIGKILL) when the thread that started it ends, for whatever reason, so an owner
that is itself killed leaves nothing behind. The command replaces this process and keeps its pid. Elsewhere there is no
such call, and only an orderly end stops the command.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its owner, then become the command."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != owner:  # it ended before the call above could take effect
            raise SystemExit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
