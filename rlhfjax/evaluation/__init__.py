"""What a result is worth: intervals over seeds, calibration, claims with verdicts, figures."""
