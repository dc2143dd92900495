"""Distillation methods, one file each, and the code that they share."""

import engine  # noqa: F401, must be imported before torch
