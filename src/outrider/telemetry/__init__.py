"""What a run leaves behind: counters, sinks and the ledger."""
