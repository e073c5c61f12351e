"""From what was measured to what is done: decide, then apply in place or step."""
