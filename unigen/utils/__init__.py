"""Small helpers that know nothing of models: files, numbers, command lines, progress."""
