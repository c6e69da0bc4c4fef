"""Testing/run.py: what it installs, when, and what it says when it cannot. pip and venv are replaced by a recorder."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RUN_FILE = Path(__file__).resolve().parents[1] / "run.py"


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("presenceseg_run", RUN_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    (tmp_path / "Testing").mkdir()
    (tmp_path / "Testing" / "requirements.txt").write_text("numpy==2.4.6\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return tmp_path


class Recorder:
    """Stands in for subprocess.run; fails at the command number `fail_at` with `stderr`."""

    def __init__(self, fail_at=None, stderr=""):
        self.commands = []
        self.fail_at = fail_at
        self.stderr = stderr

    def __call__(self, command, **options):
        self.commands.append(command)
        failed = len(self.commands) == self.fail_at
        return subprocess.CompletedProcess(command, int(failed), stderr=self.stderr if failed else "")


def test_first_call_makes_the_environment_and_the_second_does_nothing(run, root, capsys):
    recorder = Recorder()
    run.ensure_environment(root, recorder)
    made, requirements, project = recorder.commands
    assert made == [sys.executable, "-m", "venv", str(root / ".venv")]
    assert requirements[-2:] == ["-r", str(root / "Testing" / "requirements.txt")]
    assert project[-2:] == ["--editable", str(root)] and "--no-deps" in project
    assert str(root / ".venv") in requirements[0]
    assert "Set-up took" in capsys.readouterr().out

    run.ensure_environment(root, recorder)
    assert len(recorder.commands) == 3


@pytest.mark.parametrize("changed", ["Testing/requirements.txt", "pyproject.toml"])
def test_changed_requirements_renew_the_environment(run, root, changed):
    run.ensure_environment(root, Recorder())
    (root / ".venv" / "left-over").touch()
    (root / changed).write_text("changed")
    recorder = Recorder()
    run.ensure_environment(root, recorder)
    assert len(recorder.commands) == 3
    assert not (root / ".venv" / "left-over").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_set_up_that_failed_is_done_again(run, root, step):
    with pytest.raises(run.SetupError):
        run.ensure_environment(root, Recorder(fail_at=step))
    recorder = Recorder()
    run.ensure_environment(root, recorder)
    assert len(recorder.commands) == 3


def test_an_interrupted_set_up_is_done_again(run, root):
    def interrupted(command, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.ensure_environment(root, interrupted)
    recorder = Recorder()
    run.ensure_environment(root, recorder)
    assert len(recorder.commands) == 3


def test_an_environment_of_somebody_else_is_left_alone(run, root):
    (root / ".venv").mkdir()
    (root / ".venv" / "precious").touch()
    recorder = Recorder()
    with pytest.raises(run.SetupError, match="not made by this command"):
        run.ensure_environment(root, recorder)
    assert recorder.commands == []
    assert (root / ".venv" / "precious").exists()


def test_a_missing_network_is_named(run, root):
    stderr = "WARNING: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution"
    with pytest.raises(run.SetupError, match="no network connection"):
        run.ensure_environment(root, Recorder(fail_at=2, stderr=stderr))
    with pytest.raises(run.SetupError, match="lines above"):
        run.ensure_environment(root, Recorder(fail_at=2, stderr="ERROR: No matching distribution found"))


def test_an_old_python_and_a_missing_venv_module_are_named(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run.sys, "version_info", (3, 9, 18))
        with pytest.raises(run.SetupError, match="Python 3.9 is too old"):
            run.check_python()
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run.SetupError, match="python3-venv"):
        run.check_python()


def test_further_arguments_reach_the_program(run, root):
    assert run.child_command(root, "test", ["-k", "loss"])[1:] == ["-m", "pytest", "-k", "loss"]
    demo = run.child_command(root, "demo", ["--quick"])
    assert demo[1:] == ["demo", "--out", str(root / "demo_output"), "--quick"]
    assert run.child_command(root, "demo", ["--out=here"])[1:] == ["demo", "--out=here"]
    assert run.child_command(root, "demo", ["--out", "here"])[1:] == ["demo", "--out", "here"]


def test_the_exit_code_of_the_program_is_passed_on(run, root):
    assert run.run_child([sys.executable, "-c", "raise SystemExit(7)"], root) == 7
    assert run.run_child([sys.executable, "-c", "pass"], root) == 0


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["deploy"], 2), (["--help"], 0)])
def test_a_wrong_command_shows_the_usage(arguments, code):
    done = subprocess.run([sys.executable, str(RUN_FILE), *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert "Testing/run.py demo" in (done.stderr if code else done.stdout)
