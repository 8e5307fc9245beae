"""What is trained, at equal cost."""
