"""Where models and data meet the operations."""
