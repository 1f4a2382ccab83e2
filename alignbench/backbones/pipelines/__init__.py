"""What families of diffusers folders share: components, schedule, guidance, packed latents, and what a folder may hold."""
