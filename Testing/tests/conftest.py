"""Fixtures that several test files share: the folder of real images, which exists only on some machines."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A check-in is judged by the same examples every time; elsewhere new ones are tried at each run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the real images: the environment variable PRESENCESEG_DATA, else ``shared/data`` beside the repository.

    The images' terms do not allow shipping them, so a test that asks for them skips where they are not.
    """
    folder = Path(os.environ.get("PRESENCESEG_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set PRESENCESEG_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def shared_folder(shared_data):
    """Function from a name such as ``"hippocampus/images"`` to that folder of real images; skips if it is missing."""

    def folder(name):
        path = shared_data / name
        if not path.is_dir():
            pytest.skip(f"no real images at {path}: set PRESENCESEG_DATA to a folder that holds {name}")
        return path

    return folder


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: faster for tiny networks, all the more where other processes want the cores too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def snapshot():
    """Function from a folder to all that is in it: relative path -> content of the file, or None for a folder."""

    def read(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))
        }

    return read
