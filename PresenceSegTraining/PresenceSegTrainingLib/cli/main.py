"""The command line `presenceseg`: everything that the Slicer modules do, without Slicer.

Exit codes: 0 done, 2 bad input (one sentence on stderr says what), 130 stopped by the user; anything else is a bug.
"""

import argparse
import sys
from collections.abc import Sequence

from PresenceSegLib import __version__
from PresenceSegLib.domain.errors import InputError
from PresenceSegTrainingLib.cli.demo import add_demo
from PresenceSegTrainingLib.cli.models import Interrupted, add_evaluate, add_segment, add_train
from PresenceSegTrainingLib.cli.output import Output
from PresenceSegTrainingLib.cli.projects import add_import, add_info, add_new

BAD_INPUT, STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    output = Output(parsed.json)
    try:
        parsed.command(parsed, output)
    except InputError as error:
        output.error(str(error))
        return BAD_INPUT
    except OSError as error:
        output.error(f"{error.filename or 'A file'} cannot be used ({error.strerror or error}); check it and the disk.")
        return BAD_INPUT
    except Interrupted as stopped:
        output.error(str(stopped))
        return STOPPED
    except KeyboardInterrupt:
        output.error("stopped")
        return STOPPED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="presenceseg",
        description="Train one network for all structures from volumes in which only some are annotated, and segment "
        "new volumes in all structures at once. Usual order: new, import (once per source of labels), train, segment.",
    )
    parser.add_argument("--version", action="version", version=f"presenceseg {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_new, add_import, add_info, add_train, add_segment, add_evaluate, add_demo):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON lines for other programs instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
