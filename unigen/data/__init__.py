"""Data: the rendered world, its language and its stories, and reading documents from shards."""
