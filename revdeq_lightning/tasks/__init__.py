"""Tasks: what is trained, on which loss, with which optimizer. Imported from their modules, for Lightning is slow."""
