"""Making latent consistency models out of ordinary ones, and measuring how good they are."""
