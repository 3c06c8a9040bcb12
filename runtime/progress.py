"""Progress bars, and lines in their place where there is no terminal.

It is no part of the method.
"""

import sys
import time

from tqdm import tqdm

from runtime import parallel

LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal


class _Lines:
    """A file for tqdm where there is no terminal: now and then a line in place of a moving bar."""

    def __init__(self):
        self.last, self.at = "", time.monotonic()

    def write(self, text: str) -> None:
        self.last = text.strip() or self.last
        ended = text == "\n"
        if self.last and (ended or time.monotonic() - self.at > LINE_EVERY):
            print(self.last, file=sys.stderr, flush=True)
            self.last, self.at = "", time.monotonic()

    def flush(self) -> None:
        pass


def progress(
    total: int, description: str, initial: int = 0, show: bool = True, bytes: bool = False
) -> tqdm:
    """A progress bar on rank 0: call update(), set_postfix(...), close(), as of any tqdm."""
    options = dict(total=total, desc=description, initial=initial)
    options["disable"] = not (show and parallel.is_main())
    if bytes:
        options |= dict(unit="B", unit_scale=True)
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, **options)
    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(file=_Lines(), bar_format=line, mininterval=1, **options)
