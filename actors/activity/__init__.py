"""The machine `activity`."""
