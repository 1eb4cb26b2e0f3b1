"""What models and tasks are built of, and share."""
