"""The REST facade for agents. It holds no state and no waiters: parse, ask, render; a long-poll reads a feed."""
