"""The machine `wallet`."""
