"""The autoencoders between pictures or clips and the latents that denoisers work on."""
