"""Which variant wins, how surely, and the page that shows it."""
