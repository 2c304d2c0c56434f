"""The unified model and the template of its documents."""
