"""Plain `nn.Module`s: no Lightning, no losses, no randomness of their own."""
