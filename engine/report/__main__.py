"""``python -m engine.report``."""

from engine.report.command import main
from engine.runtime.errors import run_command

run_command(main)
