"""Training of a draft model on the target model's own answers."""
