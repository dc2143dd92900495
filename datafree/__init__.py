"""Methods, a file each, and what they share."""

import engine  # noqa: F401, what it sets comes before torch
