"""How a child gives up everything it does not need: `lockdown` and `seccomp`; `process` starts and ends it."""
