"""Records of a run: console, metrics, throughput, options, plots."""
