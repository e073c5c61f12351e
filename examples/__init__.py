"""The examples. Each is a script of its own; `bench.monitor` times the demo's model."""
