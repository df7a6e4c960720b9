"""What those who run the server need: logs, metrics, traces, health, a clean end."""
