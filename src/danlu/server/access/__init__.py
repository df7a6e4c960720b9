"""Who may use the server, how much, and what may be sent to it."""
