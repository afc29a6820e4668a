"""Layouts of a run before any device is rented: what a model needs in them, and how fast each should be."""
