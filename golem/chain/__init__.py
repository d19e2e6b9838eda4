"""What touches a chain: networks, JSON-RPC, signing, the sender of payments and the checker of them, the dev chain."""
