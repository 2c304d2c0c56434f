"""Options that only some generators take: a module for each, found by its name. They do not import torch."""
