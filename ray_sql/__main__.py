"""The command `ray-sql`, `python -m ray_sql`, and what every file in `jobs/` calls.

Ctrl-C ends the process without a word while its modules are imported, which takes a second, or
many on a cold disk. `cli` takes it from there.
"""

import signal
from importlib import import_module


def main(job: str | None = None) -> None:
    """Run a job: the one that is named, or the one that the command line names first."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # as a shell sets it for what it runs in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    cli = import_module("ray_sql.cli")
    signal.signal(signal.SIGINT, handler)
    cli.main(job)


if __name__ == "__main__":
    main()
