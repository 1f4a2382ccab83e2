"""Image and text encoders: where their weights come from, how they are opened, and how inputs are prepared."""
