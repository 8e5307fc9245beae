"""Common code for text and images: batches in a resumable order, file sources, and arrays cached on disk."""
