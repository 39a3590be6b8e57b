"""Running, judging and drawing what the benchmarks measure."""
