"""What is read of parameters: their gradients packed into a table, the read of it, and who owns which gradient."""
