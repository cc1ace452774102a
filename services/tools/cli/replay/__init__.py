"""`wisp replay`: recorded sessions shown, computed again, under another policy, or sent to another suite."""
