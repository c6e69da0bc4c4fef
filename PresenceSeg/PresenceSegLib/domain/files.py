"""Files that are never half written: each is written beside its target and moved over it in one step."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PresenceSegLib.domain.errors import InputError


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, move that file over `path`.

    Readers see the old file or the new one, never a part. If the block raises, `path` is as it was and the temporary
    file is gone. The temporary name ends like the target's, since image writers choose the format by the ending.

    Raises:
        InputError: the file cannot be written (read-only or full disk, missing folder).
    """
    path = Path(path)
    temporary = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _remove(temporary)


@contextmanager
def staging_folder(beside: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder inside `beside`, on the same disk, so that its content can be moved into place.

    The folder and what is left in it are gone when the block ends.
    """
    temporary = make_folder(Path(beside) / f".partial-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Move a file over `target`, or a folder to where there is none, in one step.

    Raises InputError when the target folder exists (folders are never overwritten) or the disk refuses.
    """
    if source.is_dir() and target.exists():
        raise InputError(f"{target} exists already; it is not overwritten, choose another name.")
    make_folder(target.parent)
    try:
        os.replace(source, target)
    except OSError as error:
        raise cannot_write(target, error) from error


def make_folder(path: str | Path) -> Path:
    """Create the folder and its parents; existing ones are fine. Raises InputError if that is impossible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder {path} cannot be made ({error.strerror or error}); check the disk and your permissions."
        ) from error
    return path


def cannot_write(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
    return InputError(f"{path} cannot be written ({reason}); nothing was changed; check the disk and your permissions.")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON in UTF-8, all or nothing."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, what: str) -> dict:
    """Read a JSON object. `what` names the file's role in the message when it is missing or damaged."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no {what} at {path}; check the path.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The {what} {path} cannot be read ({error}); restore it from a copy.") from error
    if not isinstance(data, dict):
        raise InputError(f"The {what} {path} does not hold a JSON object; restore it from a copy.")
    return data


def check_format(data: dict, supported: int, path: Path, what: str) -> None:
    """Refuse a file whose `format` is missing or newer than this version of PresenceSeg can read."""
    number = data.get("format")
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{path} is not a PresenceSeg {what}: it has no format number.")
    if number > supported:
        raise InputError(
            f"{path} was written by a newer PresenceSeg ({what} format {number}, this one reads up to {supported}); "
            "update PresenceSeg to use it."
        )


def _remove(path: Path) -> None:
    # A read-only file system refuses unlink even for a file that was never made: that must not hide the real error.
    if path.exists():
        path.unlink()
