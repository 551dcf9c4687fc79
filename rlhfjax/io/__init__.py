"""The house's files: run directories, the stage cache, one process per seed."""
