"""Processes for tests that start at once: forked from one that has imported everything and runs nothing.

Python has one such parent for all tests, so what it imports is said here, once.
"""

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preload"])
