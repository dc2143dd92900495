"""How a command ends after an error or a signal: one line and an exit code."""

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from engine.runtime import errors
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "code, word", [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot write"), (errno.EIO, "error")]
)
def test_what_the_file_system_refuses_is_one_line(code, word):
    message = str(errors.explain_os_error(OSError(code, "Input/output error", "bank/x")))
    assert word in message and "bank/x" in message and "\n" not in message


@pytest.mark.parametrize("given", [["--redo", "distill"], ["--redo=distill"], ["--redo"]])
def test_a_stopped_redo_is_resumed_without_it(given, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "bank/x")
    monkeypatch.setattr("sys.argv", ["datafree_kd.py", "--seed", "1"])
    assert errors.explain(full).endswith("run the same command again")
    monkeypatch.setattr("sys.argv", ["datafree_kd.py", *given])
    assert errors.explain(full).endswith("run the same command again without --redo")


def test_a_file_that_cannot_be_read_is_no_place_to_write(tmp_path, monkeypatch):
    (tmp_path / "x").touch()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.R_OK)
    message = errors.explain(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x")))
    assert message.startswith("cannot read") and "--save_dir" not in message


def test_text_and_pictures_that_cannot_be_read_are_one_line():
    for failing, word in (
        (lambda: b"caf\xe9".decode(), "byte 3"),
        (lambda: "a\udcff".encode(), "'a\udcff' is not valid UTF-8"),
        (lambda: Image.open(io.BytesIO(b"no picture")), "cannot identify image file"),
    ):
        with pytest.raises((UnicodeError, OSError)) as caught:
            failing()
        assert word in errors.explain(caught.value)


def test_odd_surroundings_end_in_one_line():
    """A launcher's variable that is no number, and a closed stderr."""
    code = "import sys\nfrom engine.runtime.errors import run_command\nrun_command(lambda: print(sys.stderr.isatty()))"
    environment = os.environ | {"WORLD_SIZE": "abc"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "WORLD_SIZE 'abc'" in done.stderr
    closed = ["bash", "-c", '"$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(closed, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_a_terminated_run_says_how_to_go_on(tmp_path):
    code = "import time\nfrom engine.runtime.errors import run_command\ndef main():\n    print('ready', flush=True)\n    time.sleep(30)\nrun_command(main)"
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell with "&" sets it to be ignored
        )
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) == expected and "same command again" in process.stderr.read()


def test_a_reader_that_stops_is_no_error():
    code = "from engine.runtime.errors import run_command\nrun_command(lambda: [print('line', flush=True) for _ in range(10**6)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == b""


@pytest.mark.parametrize("script", ["datafree_kd.py", "train_scratch.py", "-mengine.report", "-mdatafree.bank"])
def test_stopped_while_it_imports_it_prints_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(30)\n")
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in errors
