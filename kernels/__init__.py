"""Device code and its launch: one kernel family per file, forward then backward. Imports without a GPU."""
