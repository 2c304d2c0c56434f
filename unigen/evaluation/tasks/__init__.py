"""One module per task; the module's name is the task's name. A module offers `main(args: list[str]) -> int`."""
