"""Set up everything in one step and run the demo or the tests.

    python3 Testing/run.py demo [options of `presenceseg demo`]
    python3 Testing/run.py test [options of pytest]

Needs Python 3.10 or later and, the first time, a network connection. What it installs goes into .venv in the
repository root and nowhere else; delete that folder to start afresh.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP_NAME = "presenceseg-setup.txt"
UNFINISHED = "unfinished"
# Each of these would send pip's packages, or the child's imports, somewhere else than .venv.
MISLEADING_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
NO_NETWORK = re.compile(
    r"name resolution|getaddrinfo failed|nodename nor servname|NewConnectionError|ConnectTimeoutError"
    r"|ProxyError|Network is unreachable|Connection refused"
)


class SetupError(Exception):
    """One sentence for the user: what is wrong and what to do."""


def main(arguments):
    """Run one command line; returns the exit code of the demo or of pytest, 2 for a wrong command, 1 for a failed
    set-up."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments[:1] not in (["demo"], ["test"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        check_python()
        ensure_environment(ROOT)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_child(child_command(ROOT, arguments[0], arguments[1:]), ROOT)


def check_python():
    """Refuse a Python that cannot make the environment."""
    if sys.version_info < (3, 10):  # noqa: UP036 (the interpreter that was called may be any)
        version = ".".join(str(part) for part in sys.version_info[:2])
        raise SetupError(f"Python {version} is too old, run this command with Python 3.10 or later.")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python cannot make virtual environments, install its venv module (Debian, Ubuntu: apt install "
            "python3-venv)."
        )


def ensure_environment(root, run=subprocess.run):
    """Make ``root/.venv`` hold what Testing/requirements.txt says and this project; does nothing if it already does.

    The stamp file inside tells: absent, the folder is not ours and stays untouched; "unfinished", a set-up was
    interrupted; otherwise the fingerprint of what was installed.

    Raises SetupError if the environment cannot be made.
    """
    folder = root / ".venv"
    stamp = folder / STAMP_NAME
    wanted = fingerprint(root)
    if folder.exists():
        if not stamp.is_file():
            raise SetupError(f"{folder} was not made by this command, rename or delete it and run the command again.")
        if stamp.read_text(encoding="utf-8") == wanted:
            return
        remove(folder)
    start = time.monotonic()
    print(f"Setting up {folder}: this takes a few minutes, once.", flush=True)
    folder.mkdir()
    stamp.write_text(UNFINISHED, encoding="utf-8")
    install(root, run)
    stamp.write_text(wanted, encoding="utf-8")
    print(f"Set-up took {time.monotonic() - start:.0f} s.", flush=True)


def fingerprint(root):
    """Digest of all that decides what the environment holds: requirements, project file, Python version, place."""
    digest = hashlib.sha256()
    for name in ("Testing/requirements.txt", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    digest.update(repr((sys.version_info[:2], str(root))).encode())
    return digest.hexdigest()


def remove(folder):
    """Delete an environment that this command made earlier."""
    if Path(sys.prefix).resolve() == folder.resolve():
        raise SetupError(f"{folder} must be renewed, run this command with a Python outside of it.")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SetupError(f"{folder} cannot be deleted ({error}), close the programs that use it.") from error


def install(root, run):
    """Fill ``root/.venv``: the pinned packages, then this project so that edited sources take effect at once."""
    python = str(program(root, "python"))
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    steps = [
        ("make .venv", [sys.executable, "-m", "venv", str(root / ".venv")]),
        ("install Testing/requirements.txt", [*pip, "-r", str(root / "Testing" / "requirements.txt")]),
        ("install the project", [*pip, "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(root)]),
    ]
    for what, command in steps:
        done = run(command, env=clean_environment(), stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            if NO_NETWORK.search(done.stderr):
                raise SetupError(f"could not {what}: no network connection, check it and the proxy settings.")
            raise SetupError(f"could not {what}, the reason is in the lines above.")


def clean_environment():
    """The caller's environment variables without those that would lead pip or Python out of .venv."""
    return {name: value for name, value in os.environ.items() if name not in MISLEADING_VARIABLES}


def program(root, name):
    """Path of a program inside ``root/.venv``."""
    if os.name == "nt":
        return root / ".venv" / "Scripts" / f"{name}.exe"
    return root / ".venv" / "bin" / name


def child_command(root, command, further):
    """The program and arguments that do the work."""
    if command == "test":
        return [str(program(root, "python")), "-m", "pytest", *further]
    if not any(argument.split("=")[0] == "--out" for argument in further):
        further = ["--out", str(root / "demo_output"), *further]
    return [str(program(root, "presenceseg")), "demo", *further]


def run_child(command, root):
    """Run the work in the repository root and return its exit code, as a shell would give it."""
    try:
        code = subprocess.run(command, cwd=root, env=clean_environment()).returncode
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
