"""Names: which occur twice, and which can be folders on every system."""

import re
from collections import Counter

from PresenceSegLib.domain.errors import InputError


def repeated(names: list[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def check_case_name(name: str) -> None:
    """Raises InputError when the name cannot be a folder on every system."""
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # by Windows
    if reserved or not re.fullmatch(r"[\w][\w .,()+-]*", name) or name != name.strip() or name.endswith("."):
        raise InputError(
            f'"{name}" cannot be a case name: use letters, digits, blanks and _ - . , ( ) + only, and no name that '
            "Windows reserves."
        )
