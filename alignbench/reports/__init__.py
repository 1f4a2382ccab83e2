"""Reports of many runs: verdicts, tables, plots and one self-contained page."""
