"""The machine `negotiation`: proposals and agreements."""
