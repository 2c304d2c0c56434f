"""Finding, reading and writing model folders."""
