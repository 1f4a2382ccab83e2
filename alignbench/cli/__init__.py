"""The command line, and what a person sees in the terminal."""
