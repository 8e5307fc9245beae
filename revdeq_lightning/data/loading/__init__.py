"""What all data modules share: batches in a resumable order, and arrays cached on disk."""
