"""Clipping across ranks: from a DTensor to this rank's part of it, and from the statistics of parts to those of wholes.

DTensors need no word from the user. What their placements do not tell is declared by the two functions here.
"""

from .declare import mark_sharded, mark_shared

__all__ = ["mark_sharded", "mark_shared"]
