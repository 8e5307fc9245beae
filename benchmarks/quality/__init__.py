"""Quality of trained models at equal cost."""
