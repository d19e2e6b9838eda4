"""Do the books add up? Reads rows of ledger and wallet; says which document does not fit."""
