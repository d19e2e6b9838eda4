"""The machine `provider`, of the provider agent."""
