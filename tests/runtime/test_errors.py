"""How a command ends after an error or a signal: one line and an exit code."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from engine.runtime import errors
from tests.conftest import ROOT


@pytest.mark.parametrize("code, word", [(errno.ENOSPC, "no space left"), (errno.EACCES, "--save_dir"), (errno.EIO, "error")])
def test_what_the_file_system_refuses_is_one_line(code, word):
    message = str(errors.explain_os_error(OSError(code, "Input/output error", "bank/x")))
    assert word in message and "bank/x" in message and "\n" not in message


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
