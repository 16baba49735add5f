"""Base models: found, loaded, and read as matrices."""
