"""Reading cards: `danlu show` in the terminal, `danlu report` as one HTML page."""
