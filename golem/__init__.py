"""What touches the world: libp2p, chain, processes, REST, CLI and the wiring."""

import sys

# httpx brings a command line of its own, and with it rich and pygments, into every process that makes a request: a tenth of a
# second at each start of a node, an agent, an exe-unit. Where that module cannot be imported, httpx does without.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
