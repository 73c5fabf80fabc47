"""A run folder on disk: its files, its logs read back, samples, warnings, calibration."""
