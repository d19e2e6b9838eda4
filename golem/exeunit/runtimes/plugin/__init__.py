"""Runtimes that are programs of their own, named by descriptors."""
