"""The contract on disk: columns, shards and their codec, manifests, folders that others wrote.

Imports the ground alone."""
