"""``python -m datafree.benchmark``."""

from datafree.benchmark.loops import main
from engine.runtime.errors import run_command

run_command(main)
