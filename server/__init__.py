"""The coordinator: rounds, merging, ledger, service."""
