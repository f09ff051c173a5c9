"""One file a peer: `load(task, clock)` makes what draws, and nothing else imports that peer."""
