"""Faster forms of a language model's parts for a CPU."""
