"""The embedded models: how the small ones that ship were trained, and the drawn data they learnt from."""
