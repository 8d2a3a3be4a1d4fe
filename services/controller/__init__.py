"""The controller: which revisions exist, who holds them, and where new requests go. Sees no prompt."""
