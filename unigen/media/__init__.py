"""Pictures in and out: read, shown, written."""
