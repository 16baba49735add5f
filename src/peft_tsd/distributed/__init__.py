"""Several processes: what is split over them, and who does what."""
