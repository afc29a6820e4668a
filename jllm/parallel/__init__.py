"""Who is where among the processes of a run, and what they tell each other.

Imports torch and the package's ground (errors, options) only: models and the trainer both ask here.
"""
