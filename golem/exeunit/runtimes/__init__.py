"""Runtimes: what an activity may be run in. Each is one module that implements `base.Runtime`."""
