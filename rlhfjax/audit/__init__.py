"""What a finished run can say of the open problems of RLHF: `python -m rlhfjax.audit RUN_DIR`."""
