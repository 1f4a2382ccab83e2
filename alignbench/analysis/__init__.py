"""What the records of a comparison say: curves, contrasts between methods, and what so many seeds can show."""
