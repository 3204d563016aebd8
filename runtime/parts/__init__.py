"""What stands around the denoiser: text encoder, VAE, image encoder, pictures."""
