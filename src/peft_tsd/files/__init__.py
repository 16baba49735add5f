"""Files: written whole, opened safely."""
