"""Real preference data: files as people have them -> records -> token arrays -> batches. See `formats.read`."""
