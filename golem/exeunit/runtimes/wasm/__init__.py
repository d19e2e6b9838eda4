"""The runtime `wasmtime`: WASI commands, each in a locked-down process."""
