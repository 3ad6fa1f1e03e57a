"""Small random models of each family, made of diffusers' own classes."""
