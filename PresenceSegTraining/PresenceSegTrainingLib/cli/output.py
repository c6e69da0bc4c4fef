"""What the command line says: text and a progress bar for people, JSON lines for machines."""

import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm


class Output:
    """Where a command reports to.

    For people, text goes to stdout and progress bars to stderr. For machines (`as_json`), stdout holds one JSON object
    per line, with a `type`: any number of "progress", then one "result" or "error".
    """

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a Windows pipe may lack a character of a name

    def text(self, line: str = "") -> None:
        if not self.as_json:
            print(line, flush=True)

    def result(self, **data: Any) -> None:
        if self.as_json:
            self._emit("result", data)

    def error(self, message: str) -> None:
        if self.as_json:
            self._emit("error", {"message": message})
        else:
            print(f"presenceseg: {message}", file=sys.stderr, flush=True)

    def progress(self, **data: Any) -> None:
        if self.as_json:
            self._emit("progress", data)

    def bar(self, what: str, total: int | float, **options: Any) -> tqdm:
        """A progress bar on stderr, silent for machines."""
        return tqdm(desc=what, total=total, file=sys.stderr, disable=self.as_json, dynamic_ncols=True, **options)

    def loop(self, what: str):
        """A function that wraps a loop over (items, total) so that its progress is shown."""

        def wrap(items: Iterable, total: int) -> Iterator:
            with self.bar(what, total) as bar:
                for done, item in enumerate(items):
                    self.progress(task=what, done=done, total=total)
                    yield item
                    bar.update()

        return wrap

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A plain text table; the first column is left-aligned, the others right-aligned."""
        lines = [list(header), *([_cell(value) for value in row] for row in rows)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
        for number, line in enumerate(lines):
            first = line[0].ljust(widths[0])
            rest = "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            self.text(f"{first}  {rest}".rstrip())
            if number == 0:
                self.text("-" * (sum(widths) + 2 * (len(widths) - 1)))

    def _emit(self, kind: str, data: dict) -> None:
        print(json.dumps({"type": kind, **data}), flush=True)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
