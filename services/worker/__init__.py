"""The worker: holds revisions of one model and generates their tokens. It speaks token ids, never text."""
