"""The benchmarks. From the repository root: python -m bench.clip, bench.step, bench.rules, bench.monitor, bench.gpu;
python -m bench.report writes their results into docs/benchmarks.md and the README."""
