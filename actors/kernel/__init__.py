"""The kernel: runs pure machines durably. See `machine` for the vocabulary, `system` for the whole."""
