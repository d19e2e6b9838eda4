"""The machine `market`."""
