"""The libraries of csrc/: what they are, where they come from, and their C interfaces."""
