"""Records of a run: console, metrics, throughput, options, plots.

Imports the run's options and shape; a run tells its records what happened, and they ask nothing.
"""
