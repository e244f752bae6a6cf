"""Device code and its launch: one kernel family per file, forward then backward. Importing it needs no GPU."""
