"""Records of runs: typed and versioned, read back as frames."""
