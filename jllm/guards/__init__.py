"""What stands between a command and files that it did not make: caches that are ours, sizes that are bounded.

A part of the ground: every package may import it, and it imports nothing of ours but the ground.
"""
