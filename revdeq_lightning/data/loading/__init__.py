"""What text and images share: batches in a resumable order, sources of files, and arrays cached on disk."""
