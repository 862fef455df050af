"""Continued training: heal a split, or let copies come to differ."""
