"""Progress: what work that takes long tells of how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done, and how much there is."""
