"""The drafter: takes requests, guesses their next tokens, and sees every session through to its end."""
