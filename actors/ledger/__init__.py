"""The machine `ledger`."""
