"""Every task with every adapter, in two programs: the same cell asked of calotype and of diffusers."""
