"""What the commands print: tables of runs, comparisons, tunings, trials and records."""
