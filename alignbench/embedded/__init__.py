"""The training of the small models that ship, and the drawn data on which they are trained."""
