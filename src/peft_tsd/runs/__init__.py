"""The folder, log and machine of a run."""
