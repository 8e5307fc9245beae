"""Against others: the authors' code and torchdeq."""
